"""`plan` answers soon and in little memory whatever stands in a header; one sentence, or a plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory import hostile_headers
from tests.memory.checkpoints import MODEL, flux, sd3, sd15_unet, stored_as, write_hole
from tests.memory.hostile_headers import GGUF, LORAS, SAFETENSORS

MOST_SECONDS = 4.0
"""Of the processor. A quick one takes at most 1.3; what these headers were made for took 30 and more."""

MOST_BYTES = 300 * 10**6
CHECKPOINTS = hostile_headers.checkpoints(flux(), sd15_unet(), sd3(24))
PLAN = """
import json, sys, time
from pathlib import Path
from lib_precision_lora.cli import main
code = main(["plan", *sys.argv[1:], "--card", "24GiB", "--json"])
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(json.dumps([code, time.process_time(), 1024 * int(peak.split()[1])]), file=sys.stderr)
"""

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is asked of Linux: run it there"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "flux.safetensors"
    return write_hole(path, stored_as("F16", flux(), MODEL))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return write_hole(path, {"double_blocks.0.img_attn.qkv.diff": ("F16", (9216, 3072))})


def plan(*files: Path) -> tuple[int, str]:
    """The exit code and what is printed, within the bounds."""
    command = [sys.executable, "-c", PLAN, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    *messages, measured = done.stderr.splitlines()
    code, seconds, peak = json.loads(measured)
    assert seconds < MOST_SECONDS
    assert peak < MOST_BYTES
    assert len(messages) == (code == 2), messages
    return code, done.stdout


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_safetensors_header_of_no_lora_is_refused_soon(name: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(SAFETENSORS[name]())
    code, printed = plan(model, path)
    assert code == 2
    assert str(path) in json.loads(printed)["error"]


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_header_of_no_model_is_refused_soon(name: str, lora: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF[name]())
    code, printed = plan(path, lora)
    assert code == 2
    assert str(path) in json.loads(printed)["error"]


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_of_many_names_is_planned_soon(name: str, model: Path, tmp_path: Path) -> None:
    code, printed = plan(model, write_hole(tmp_path / "lora.safetensors", LORAS[name]()))
    assert code in (0, 1, 2)
    (row,) = json.loads(printed)["loras"]
    assert row["layers"] > 0


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_many_names_is_planned_soon(name: str, lora: Path, tmp_path: Path) -> None:
    code, printed = plan(write_hole(tmp_path / "model.safetensors", CHECKPOINTS[name]()), lora)
    assert code == (2 if name == "features of the prompt" else 0)
    assert ("error" in json.loads(printed)) == (code == 2)
