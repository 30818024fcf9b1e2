"""A LoRA file of any bytes: read as one, inspected, planned."""

from __future__ import annotations

from pathlib import Path

from lib_precision_lora.containers import ContainerError, LoraContent, read_lora
from lib_precision_lora.plain_text import sentence
from tests.fuzz.said import command
from tests.fuzz.target import Fault
from tests.fuzz.texts import check_said


def read(folder: Path, name: str) -> LoraContent | None:
    """None where it is refused. Each value is looked at: a tensor over memory that is not its own ends the
    process."""
    try:
        content = read_lora(Path(name))
    except ContainerError as error:
        check_refusal(str(error), folder)
        return None
    size = Path(name).stat().st_size
    if content.held_bytes > size:
        raise Fault(f"the tensors hold {content.held_bytes} bytes of a file of {size}")
    for tensor in content.values():
        tensor.clone()
    return content


def check_refusal(reason: str, folder: Path) -> None:
    """A reason in a sentence, which is the true one: none of these files needs memory."""
    check_said(sentence(reason), folder)
    if "there is no memory" in reason:
        raise Fault(f"the reason is not the file's: {reason}")
    if len(reason) > 1000:
        raise Fault(f"the reason has {len(reason)} characters")


def inspect(folder: Path, name: str, accepted: bool, as_json: bool) -> None:
    """The command agrees with the reader."""
    code = command(folder, "inspect", name, *(["--json"] if as_json else []))
    if (code == 2) == accepted:
        raise Fault(f"inspect says {code} of a file that is {'accepted' if accepted else 'refused'}")
