"""Law 2 and law 6 in a forward of a convolution whose inputs are rotated with the positions of the kernel."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.forward.patches import patch_blocks
from tests.branch.meter import metered
from tests.families import BASE_STD, INPUT_ROTATIONS, Family, family
from tests.oracles import Step, merge

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (23,), 2: (9, 11), 3: (4, 6, 5)}
GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "even": {"kernel_size": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "replicate-same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}
STACK = (("lora", 0.8), ("lokr-right", 0.5), ("diff", -0.3), ("oft-peft", 0.7), ("dora-in", 0.6))


def conv(dimensions: int, **options: object) -> nn.Module:
    torch.manual_seed(4)
    layer = CONVS[dimensions](8, 16, **options).requires_grad_(False)
    layer.weight.mul_(BASE_STD / layer.weight.std())
    return layer


def image(dimensions: int, *batch: int) -> Tensor:
    return torch.randn(*batch, 8, *SIZES[dimensions], generator=torch.manual_seed(5))


def error(layer: nn.Module, x: Tensor, applied: list[tuple[Family, float]]) -> float:
    """Of the forward in the layer's type from that of the merged weight in float64, relative to it."""
    exact = copy.deepcopy(layer).double()
    exact.weight.copy_(merge(layer.weight, [Step(made.change, strength) for made, strength in applied])[0])
    model = nn.ModuleDict({"layer": layer})
    with torch.no_grad(), PatchSession(model) as session:
        before = layer(x)
        session.apply([("file", {"layer.weight": made.adapter}, strength) for made, strength in applied])
        y, expected = layer(x), exact(x.double())
    assert not torch.equal(y, before)
    return float((y.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dimensions", CONVS)
def test_every_geometry_alone_and_in_a_stack(dimensions: int, geometry: str) -> None:
    layer = conv(dimensions, **GEOMETRIES[geometry])
    shape = tuple(layer.weight.shape)
    alone = [(family("boft-peft", shape), 0.6)]
    stack = [(family(name, shape, seed), strength) for seed, (name, strength) in enumerate(STACK)]
    for applied in (alone, stack):
        assert error(layer, image(dimensions, 2), applied) <= 1e-5
    assert error(layer, image(dimensions), alone) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INPUT_ROTATIONS)
def test_half_activations_are_off_by_their_own_roundings(name: str, dtype: torch.dtype) -> None:
    """Two of the output, the host's and ours, and one of the shift of the input."""
    layer, x = conv(2, kernel_size=3, padding=1).to(dtype), image(2, 2).to(dtype)
    made = family(name, tuple(layer.weight.shape))
    assert error(layer, x, [(made, 0.7)]) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_module_keeps_its_own_geometry_and_is_run_with_its_own_parameters(geometry: str) -> None:
    layer = conv(2, **GEOMETRIES[geometry])
    numbers = dict(vars(layer))
    parameters = dict(layer.named_parameters())
    model = nn.ModuleDict({"layer": layer})
    with torch.no_grad(), PatchSession(model) as session:
        adapter = family("oft-peft", tuple(layer.weight.shape)).adapter
        session.apply([("file", {"layer.weight": adapter}, 1.0)])
        layer(image(2, 1))
    assert vars(layer) == numbers
    assert all(getattr(layer, name) is parameter for name, parameter in parameters.items())


def test_a_change_of_the_modules_padding_is_seen_in_the_next_forward() -> None:
    layer = conv(2, kernel_size=3, padding=1)
    adapter = family("oft-peft", tuple(layer.weight.shape))
    weight, _ = merge(layer.weight, [Step(adapter.change, 1.0)])
    model, x = nn.ModuleDict({"layer": layer}), image(2, 1)
    with torch.no_grad(), PatchSession(model) as session:
        session.apply([("file", {"layer.weight": adapter.adapter}, 1.0)])
        layer(x)
        layer.padding_mode = "circular"
        exact = copy.deepcopy(layer).double()
        exact._forward_hooks.clear()
        exact.weight.copy_(weight)
        expected = exact(x.double())
        assert float((layer(x).double() - expected).norm() / expected.norm()) <= 1e-5


def test_patches_exist_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_precision_lora.branch.forward.patches.WORKSPACE_BYTES", 64 * 1024)
    layer = nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 16, 64, 64)
    blocks = list(patch_blocks(layer, x[0]))
    assert len(blocks) == 64
    assert {tuple(block.shape) for block in blocks} == {(64, 144)}
    made, model = family("oft-peft", (32, 16, 3, 3)), nn.ModuleDict({"layer": layer})
    session = PatchSession(model)
    session.apply([("file", {"layer.weight": made.adapter}, 1.0)])
    layer(x)
    meter = metered(lambda: layer(x))
    assert meter.operations > 64
    assert meter.largest <= 32 * 64 * 64 < 144 * 64 * 64


@pytest.mark.parametrize("name", INPUT_ROTATIONS)
def test_a_grouped_convolution_is_refused(name: str) -> None:
    layer = nn.Conv2d(8, 16, 3, groups=2).requires_grad_(False)
    model = nn.ModuleDict({"layer": layer})
    with pytest.raises(AdapterError, match=r"layer.* turned inputs of a grouped convolution"):
        PatchSession(model).apply([("file", {"layer.weight": family(name, (16, 4, 3, 3)).adapter}, 1.0)])
