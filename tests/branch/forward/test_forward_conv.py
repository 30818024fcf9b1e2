"""Law 2 in a forward of a convolution, whatever its geometry and the memory layout of its output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, PatchSession
from tests.branch.forwards import Pairs, assert_exact_forward, forward
from tests.branch.hosts import Holder
from tests.branch.recipes import BASE_STD, generator, noise, recipe

WIDTH, HEIGHT = 8, 12
SIZES = {1: (40,), 2: (9, 11), 3: (4, 6, 5)}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
pytestmark = pytest.mark.usefixtures("arithmetic")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = pytest.mark.parametrize("dtype", TYPES, ids=str)
GEOMETRIES = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "stride": 2},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    "replicate-same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
}
ADAPTERS = ("lora-rank-8-fp16", "tucker-rank-4", "diff-bf16")


def conv(dimensions: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    layer = CONVS[dimensions](WIDTH, HEIGHT, **options)
    layer.weight.data = noise(tuple(layer.weight.shape), generator(1), BASE_STD)
    layer.bias.data = noise((HEIGHT,), generator(2), 0.1)
    return layer.to(dtype).requires_grad_(False)


def images(dimensions: int, dtype: torch.dtype, *batch: int) -> Tensor:
    return noise((*batch, WIDTH, *SIZES[dimensions]), generator(3)).to(dtype)


def one(layer: nn.Module, name: str, **options: object) -> Pairs:
    return {"weight": [recipe(name, tuple(layer.weight.shape)).patch("layer.weight", 0.8, **options)]}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dimensions", CONVS)
def test_every_geometry(dimensions: int, geometry: str) -> None:
    if dimensions == 3 and GEOMETRIES[geometry].get("padding_mode") == "reflect":
        geometry = "circular"
    layer = conv(dimensions, **GEOMETRIES[geometry])
    for name in ADAPTERS:
        assert_exact_forward(layer, one(layer, name), images(dimensions, torch.float32, 2))


@ACTIVATIONS
@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize("geometry", ["1x1", "strided", "grouped", "circular"])
def test_every_activation_type_and_mode(geometry: str, compute: Compute, dtype: torch.dtype) -> None:
    layer = conv(2, dtype, **GEOMETRIES[geometry])
    stack = one(layer, "lora-rank-16-bf16")["weight"] + one(layer, "tucker-rank-2-fp16")["weight"]
    bias = [recipe("diff-fp32", (HEIGHT,)).patch("layer.bias", 4.0)]
    assert_exact_forward(layer, {"weight": stack, "bias": bias}, images(2, dtype, 3), compute)


@ACTIVATIONS
def test_set_and_base_factor_and_rows(dtype: torch.dtype) -> None:
    layer = conv(2, dtype, **GEOMETRIES["grouped"])
    rows = recipe("lora-rank-1", (5, WIDTH // 2, 3, 3)).patch("layer.weight", 1.0, (4, 5))
    for pairs in (one(layer, "set-fp16"), one(layer, "lora-rank-1", factor=0.5), {"weight": [rows]}):
        assert_exact_forward(layer, pairs, images(2, dtype, 3))


@pytest.mark.parametrize("dimensions", CONVS)
@ACTIVATIONS
def test_an_input_without_a_batch(dimensions: int, dtype: torch.dtype) -> None:
    layer = conv(dimensions, dtype, **GEOMETRIES["padded"])
    for name in ADAPTERS:
        assert_exact_forward(layer, one(layer, name), images(dimensions, dtype))


def test_an_empty_batch() -> None:
    layer = conv(2, **GEOMETRIES["padded"])
    assert forward(layer, one(layer, "lora-rank-1"), images(2, torch.float32, 0)).patched.shape[0] == 0


@ACTIVATIONS
@pytest.mark.parametrize("geometry", ["1x1", "strided"])
def test_channels_last_outputs_are_added_to_in_place(dtype: torch.dtype, geometry: str) -> None:
    layer = conv(2, dtype, **GEOMETRIES[geometry]).to(memory_format=torch.channels_last)
    x = images(2, dtype, 3).to(memory_format=torch.channels_last)
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    assert_exact_forward(layer, one(layer, "lora-rank-8-fp16"), x)
    with PatchSession(holder := Holder(layer)) as session:
        session.apply_patches([one(layer, "lora-rank-8-fp16")["weight"][0][0]])
        y = holder(x)
    assert outputs[-1] is y
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_inputs_that_are_not_contiguous() -> None:
    layer = conv(2, **GEOMETRIES["padded"])
    wide = noise((2, 2 * WIDTH, 14, 16), generator(4))
    for x in (
        wide[:, ::2],
        wide[:, WIDTH:],
        wide[:, :WIDTH].transpose(2, 3),
        wide[:1, :WIDTH].expand(3, -1, -1, -1),
    ):
        assert not x.is_contiguous()
        assert_exact_forward(layer, one(layer, "lora-rank-8-fp16"), x)


def test_an_output_whose_positions_have_gaps_is_patched_too() -> None:
    layer = conv(2, **GEOMETRIES["padded"])
    layer.register_forward_hook(lambda module, args, output: torch.cat([output, output], -1)[..., ::2])
    x = torch.ones(2, WIDTH, 6, 6)
    host = layer(x)
    assert not host.is_contiguous()
    with PatchSession(holder := Holder(layer)) as session:
        session.apply_patches([recipe("diff-fp32", (HEIGHT,)).patch("layer.bias", 2.0)[0]])
        delta = recipe("diff-fp32", (HEIGHT,)).delta
        assert delta is not None
        torch.testing.assert_close(holder(x) - host, 2.0 * delta.float().view(-1, 1, 1).expand_as(host))


def test_padding_that_the_host_changes_while_attached_is_followed() -> None:
    layer = conv(2, **GEOMETRIES["padded"])
    pairs = one(layer, "lora-rank-8-fp16")
    x = images(2, torch.float32, 1)
    with PatchSession(holder := Holder(layer)) as session:
        session.apply_patches([patch for patch, _ in pairs["weight"]])
        holder(x)
        layer.padding_mode = "circular"
        patched = holder(x)
    result = forward(layer, pairs, x)
    assert float((patched.double() - result.exact).norm()) <= result.allowed


def test_many_channel_and_row_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("conv", "rows"):
        monkeypatch.setattr(f"lib_precision_lora.branch.forward.{module}.WORKSPACE_BYTES", 8 * 99 * 3)
    monkeypatch.setattr("lib_precision_lora.branch.forward.rows.DENSE_BLOCK_BYTES", 4 * WIDTH * 9 * 5)
    for dtype in TYPES:
        for compute in ("auto", "fp16"):
            for geometry in ("padded", "grouped"):
                layer = conv(2, dtype, **GEOMETRIES[geometry])
                stack = one(layer, "lora-rank-8-fp16")["weight"] + one(layer, "diff-bf16")["weight"]
                assert_exact_forward(layer, {"weight": stack}, images(2, dtype, 2), compute)
