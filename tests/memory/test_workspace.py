"""The workspace of a plan is what the branches take, within law 4's 32 MiB."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.memory.architecture import Flow, Request
from lib_precision_lora.memory.checkpoint import Layer
from lib_precision_lora.memory.lora_footprints import workspace_bytes
from lib_precision_lora.memory.lora_header import read_lora_header
from lib_precision_lora.memory.naming import Place
from tests.branch.meter import metered
from tests.families import family

MIB = 2**20


@pytest.mark.parametrize(("size", "height", "width"), [(256, 64, 64), (1024, 256, 384)])
@pytest.mark.parametrize("name", ["lora", "lora-conv", "diff"])
def test_a_forward_takes_what_the_plan_says(
    name: str, size: int, height: int, width: int, tmp_path: Path
) -> None:
    conv = name == "lora-conv"
    shape = (height, width, 3, 3) if conv else (height, width)
    tensors = {
        f"layer.{key}": value for key, value in family(name.removesuffix("-conv"), shape).tensors.items()
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    flow = Flow("positions", level=1) if conv else Flow("image")
    layer = Layer("layer", height, width, shape[2:], "F16", 0, flow)
    places = SimpleNamespace(find=lambda name: Place("diffusion model", layer, 0, height))
    header = read_lora_header(tmp_path / "a.safetensors", places)  # type: ignore[arg-type]
    planned = workspace_bytes(header.model, Request(size, size, images=1, text_tokens=77), half=False)

    module = nn.Conv2d(width, height, 3, padding=1) if conv else nn.Linear(width, height)
    side = size // 16
    x = torch.ones(1, width, side, side) if conv else torch.ones(1, side * side, width)
    module, x = module.to(torch.bfloat16).requires_grad_(False), x.to(torch.bfloat16)
    model = nn.ModuleDict({"layer": module})
    session = PatchSession(model)
    session.apply([("file", {"layer.weight": next(iter(read_adapters(tensors).values()))}, 1.0)])
    base = torch.zeros(1, height, side, side) if conv else torch.zeros(1, side * side, height)
    base = base.to(torch.bfloat16)
    module.forward = lambda x: base  # type: ignore[method-assign]
    module(x)
    measured = metered(lambda: module(x)).peak
    assert 0 < measured <= planned
    assert planned - measured <= 32 * MIB
