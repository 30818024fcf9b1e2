"""The host's own convolution, run patch by patch: its casts of weights see the same module and parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from lib_precision_lora.branch import PatchSession
from tests.families import INPUT_ROTATIONS, family
from tests.forge.real_forge import Forge
from tests.oracles import Step, merge
from tests.tiny import values

SHAPE = (16, 8, 3, 3)


@pytest.mark.parametrize("manual_cast", [False, True])
@pytest.mark.parametrize("name", INPUT_ROTATIONS)
def test_a_rotation_of_inputs_is_that_of_the_merged_weight(
    forge: Forge, name: str, manual_cast: bool
) -> None:
    stored = torch.float16 if manual_cast else torch.float32
    with forge.operations.using_forge_operations(
        device=torch.device("cpu"), dtype=stored, manual_cast_enabled=manual_cast
    ):
        layer = nn.Conv2d(8, 16, 3, padding=1, stride=2)
    layer.load_state_dict({"weight": (values(*SHAPE) / 30).to(stored), "bias": values(16).to(stored)})
    model, x = nn.ModuleDict({"layer": layer}).requires_grad_(False), values(2, 8, 9, 7)
    assert type(layer) is not nn.Conv2d
    made = family(name, SHAPE)
    weight, _ = merge(layer.weight, [Step(made.change, 0.7)])
    expected = conv2d(x.double(), weight, layer.bias.double(), stride=2, padding=1)
    with PatchSession(model) as session, torch.inference_mode():
        session.apply([("file", {"layer.weight": made.adapter}, 0.7)])
        y = layer(x)
    assert y.dtype == torch.float32
    assert float((y.double() - expected).norm() / expected.norm()) <= 1e-5
