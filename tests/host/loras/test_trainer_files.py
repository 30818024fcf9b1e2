"""Files as trainers write them, from the disk to the image, and what log, page and report say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lib_precision_lora.host.generation.generations import Generations
from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.loras.files import FileProblem, LoraFiles, Stamp
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.observers import log_lines
from tests.host.webui import Host

EXACT = 1e-5
MODULE = "diffusion_model.blocks.0.attn"
G = torch.Generator().manual_seed(11)
UP, DOWN = torch.randn(8, 2, generator=G) / 2, torch.randn(2, 8, generator=G) / 2
PRODUCT = UP.double() @ DOWN.double()
MAGNITUDE = torch.rand(8, generator=G) + 0.5


def write(host: Host, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path = host.lora_dir / "cats.safetensors"
    safetensors.torch.save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    return path


def peft(**more: Tensor) -> dict[str, Tensor]:
    factors = {"lora_A.weight": DOWN.clone(), "lora_B.weight": UP.clone()}
    return {f"{MODULE}.{key}": value for key, value in (factors | more).items()}


def header(**config: Any) -> dict[str, str]:
    packed = {f"transformer.{name}": value for name, value in config.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(packed, sort_keys=True)}


def merged(checkpoint: Checkpoint, change: Tensor) -> Tensor:
    weight = checkpoint.weight(f"{MODULE}.weight")
    return checkpoint.exact("a cat", {f"{MODULE}.weight": weight + change.reshape(weight.shape)})


def applied(host: Host) -> tuple[Any, FileReport]:
    """The image with the file, and what its generation reports of it."""
    generations, p = Generations(), SimpleNamespace()
    generations.begin(p)
    image = generate(host, "a cat<lora:cats:1>")
    report = generations.end(p, "Automatic")
    assert report is not None
    (file,) = report.files
    assert report.to_json()["files"][0]["findings"] == list(file.findings)
    return image, file


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 2, "lora_alpha": 3}, 1.5),
        ({"r": 2, "lora_alpha": 3, "use_rslora": True}, 3 / 2**0.5),
        ({"r": 2, "lora_alpha": 3, "alpha_pattern": {"0.attn": 1}}, 0.5),
        ({"r": 2, "lora_alpha": 3, "alpha_pattern": {"1.attn": 1}}, 1.5),
    ],
)
def test_an_alpha_that_stands_in_the_header_alone_is_applied(
    host: Host, checkpoint: Checkpoint, config: Mapping[str, Any], scale: float
) -> None:
    write(host, peft(), header(**config))
    image, file = applied(host)
    assert distance(image, merged(checkpoint, scale * PRODUCT)) < EXACT
    assert file.alphas == (float(dict(config.get("alpha_pattern", {})).get("0.attn", 3)),)
    assert file.findings == ()
    assert not image.comments


def test_a_header_that_disagrees_is_said_in_log_and_report(host: Host, checkpoint: Checkpoint) -> None:
    write(host, peft(alpha=torch.tensor(1.0)), header(r=2, lora_alpha=4))
    with log_lines() as lines:
        image, file = applied(host)
    assert distance(image, merged(checkpoint, 0.5 * PRODUCT)) < EXACT
    (finding,) = file.findings
    assert "header says alpha 4" in finding
    assert lines == [f"LoRA cats: {finding}"]


@pytest.mark.parametrize("part", ["magnitude", "lora_magnitude_vector", "lora_magnitude_vector.default"])
def test_a_dora_whose_magnitude_has_another_name_is_applied_as_one(
    host: Host, checkpoint: Checkpoint, part: str
) -> None:
    tensors = peft() | {f"{MODULE}.{part}": MAGNITUDE.clone()}
    write(host, tensors)
    image, file = applied(host)
    weight = checkpoint.weight(f"{MODULE}.weight")
    direction = weight + PRODUCT
    scaled = direction * (MAGNITUDE.double() / direction.norm(dim=1))[:, None]
    assert distance(image, merged(checkpoint, scaled - weight)) < EXACT
    assert (file.kinds, file.unmatched, file.findings) == ("1 × dora rank 2", (), ())


def test_a_part_that_is_not_understood_is_said_and_not_counted_as_harmless(
    host: Host, checkpoint: Checkpoint
) -> None:
    """The layer's LoRA is applied; the log does not say that the part belongs to no layer."""
    key = f"{MODULE}.vera_lambda_b"
    write(host, peft() | {key: torch.ones(8)})
    with log_lines(level=20) as lines:
        image, file = applied(host)
    assert distance(image, merged(checkpoint, PRODUCT)) < EXACT
    assert file.unmatched == ()
    assert any(key in finding for finding in file.findings)
    assert any(key in line and "not understood" in line for line in lines)
    assert not any("belong to no layer" in line for line in lines)


def test_a_file_in_a_form_that_cannot_be_read_is_not_called_one_of_another_model(
    host: Host, checkpoint: Checkpoint
) -> None:
    forms = {
        "Nunchaku": {"transformer_blocks.0.qkv_proj.lora_down": torch.ones(8, 4)},
        "cloneofsimo": {"unet:0:up": torch.ones(8, 2), "unet:0:down": torch.ones(2, 8)},
        "in a form that is not known": {f"{MODULE}.vera_lambda_b": torch.ones(8)},
    }
    for name, tensors in forms.items():
        path = write(host, tensors)
        path.touch()
        image = generate(host, "a cat<lora:cats:1>")
        assert len(image.comments) == 1
        assert name in image.comments[0]
        assert "another model" not in image.comments[0]
        path.unlink()


@pytest.mark.parametrize("content", [[torch.ones(8, 2), torch.ones(2, 8)], (torch.ones(2, 2),)])
def test_a_list_of_tensors_is_named(tmp_path: Path, content: Any) -> None:
    """cloneofsimo's `.pt` holds up, down, up, down, … without names."""
    path = tmp_path / "lora.pt"
    torch.save(content, path)
    with pytest.raises(FileProblem, match=r"it is a list of \d tensors without names, as cloneofsimo's"):
        LoraFiles().read(Stamp.of(str(path)))


def test_the_header_travels_with_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(peft(), path, header(r=2, lora_alpha=3))
    read = LoraFiles().read(Stamp.of(str(path)))
    assert read.metadata == header(r=2, lora_alpha=3)  # type: ignore[attr-defined]
    safetensors.torch.save_file(peft(), path)
    assert LoraFiles().read(Stamp.of(str(path))).metadata == {}  # type: ignore[attr-defined]
