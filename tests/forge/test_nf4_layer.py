"""The host's 4-bit layer before it is quantized, which happens in its first forward, with a branch or not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Target
from lib_precision_lora.adapters.lora import LoRA, make_lora
from lib_precision_lora.branch import Patch, PatchSession
from tests.forge.real_forge import Forge
from tests.tiny import values
from tests.traces import hooks_of, kept_objects, parameters_of

STATE: Mapping[str, Tensor] = {"weight": values(64, 128) / 11, "bias": values(64)}
LORA: LoRA = make_lora("test", values(64, 4), values(4, 128) / 100)
PATCH = Patch("test", Target("layer.weight"), LORA, 1.0)


def unquantized_layer(forge: Forge) -> nn.ModuleDict:
    """The host's `ForgeLoader4Bit` after loading an fp16 checkpoint as NF4, before any move to CUDA."""
    with forge.operations.using_forge_operations(
        device=torch.device("cpu"), dtype=torch.float32, bnb_dtype="nf4"
    ):
        layer = nn.Linear(128, 64)
    layer.load_state_dict(STATE)
    assert not layer.weight.bnb_quantized
    return nn.ModuleDict({"layer": layer}).requires_grad_(False)


def test_a_branch_stands_beside_a_layer_that_is_not_quantized_yet(forge: Forge) -> None:
    model = unquantized_layer(forge)
    before = parameters_of(model)
    with PatchSession(model) as session:
        session.apply_patches([PATCH])
        assert session.attached == ("layer",)
        assert kept_objects(model, before) == set(before)
    assert kept_objects(model, before) == set(before)
    assert torch.equal(model["layer"].weight.data, STATE["weight"])
    assert hooks_of(model) == 0


def test_a_branch_outlives_the_quantization_of_its_layer(forge: Forge) -> None:
    """On CUDA the host's `to` quantizes; bitsandbytes does the same on the CPU when it is asked to."""
    model = unquantized_layer(forge)
    x = values(5, 128)
    with PatchSession(model) as session, torch.inference_mode():
        session.apply_patches([PATCH])
        model["layer"].weight = model["layer"].weight._quantize(torch.device("cpu"))
        assert model["layer"].weight.bnb_quantized
        with_lora = model["layer"](x)
        session.clear()
        without = model["layer"](x)
    expected = x.double() @ (LORA.up.double() @ LORA.down.double()).T
    assert torch.allclose((with_lora - without).double(), expected, atol=1e-5)
