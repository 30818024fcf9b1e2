"""Law 4: the extra peak that is predicted from shapes alone is the one that a forward takes.

The law allows max(5 %, 32 MiB). These layers are small, so that more is asked here: never more than 2 MiB
above the prediction, which is itself at most 2.2 times what is measured and 4 MiB; and factors to the byte.
"""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from benchmarks.family_cost import read
from benchmarks.family_files import FILES, Sizes
from lib_precision_lora.adapters import Adapter, Target, read_adapters
from lib_precision_lora.branch import Compute, Patch
from tests.branch.measured_layers import Conv, Linear, Measured, measure
from tests.families import BASE_STD, FAMILIES, INPUT_ROTATIONS, family
from tests.storage.formats import stored_variant

pytestmark = pytest.mark.usefixtures("arithmetic")

MIB = 2**20
OUT, IN = 512, 1024
CHANNELS = 128, 160
FEW_CHANNELS = 16, 32
"""Where inputs are turned patch by patch, which takes its time."""

MODES: tuple[tuple[Compute, torch.dtype], ...] = (
    ("auto", torch.bfloat16),
    ("fp16", torch.float16),
    ("fp32", torch.float32),
)
EACH_IN_ONE_MODE = [pytest.param(name, *mode) for name, mode in zip(FAMILIES, cycle(MODES), strict=False)]
FORMATS = (
    "dense-fp16",
    "dense-bf16",
    "fp8-e4m3fn-scaled",
    "bnb-nf4",
    "gguf-Q8_0",
    "gguf-Q4_K-baked-fp16",
)
AT_4096_TOKENS = ("lora", "loha-streamed", "lokr-both", "dora-out", "dora-in", "ia3-in", "oft", "oft-peft")


def adapter_for(name: str) -> Adapter:
    if name not in FILES:
        return family(name, (OUT, IN)).adapter
    return read(FILES[name], Sizes(tokens=1, inputs=IN, outputs=OUT, rank=16))


def measured_on(layer: nn.Module, adapters: list[Adapter], x: Tensor, compute: Compute) -> Measured:
    model = nn.Sequential()
    model.add_module("layer", layer)
    patches = [Patch("file", Target("layer.weight"), adapter, 0.7) for adapter in adapters]
    tokens = x[0, 0].numel() if isinstance(layer, Conv) else None
    return measure(model, patches, x, compute, tokens=tokens)


def assert_law(measured: Measured) -> None:
    for predicted, peak in (
        (measured.predicted, measured.peak),
        (measured.predicted_streamed, measured.peak_streamed),
    ):
        assert abs(predicted - peak) <= max(0.05 * peak, 32 * MIB)
        assert peak <= predicted + 2 * MIB, f"{peak / MIB:.2f} of {predicted / MIB:.2f} MiB"
        assert predicted <= 2.2 * peak + 4 * MIB, f"{predicted / MIB:.2f} for {peak / MIB:.2f} MiB"
    assert measured.placed == measured.predicted_factors
    assert measured.live == measured.predicted_own


@pytest.mark.parametrize(("name", "compute", "dtype"), EACH_IN_ONE_MODE)
def test_a_linear_layers_peak_and_factors_are_those_predicted(
    name: str, compute: Compute, dtype: torch.dtype
) -> None:
    weight = torch.full((OUT, IN), BASE_STD, dtype=torch.float16)
    x = torch.ones(512, IN, dtype=dtype)
    assert_law(measured_on(Linear(weight, OUT), [adapter_for(name)], x, compute))


@pytest.mark.parametrize(("name", "compute", "dtype"), EACH_IN_ONE_MODE)
def test_a_convolutions_peak_and_factors_are_those_predicted(
    name: str, compute: Compute, dtype: torch.dtype
) -> None:
    outputs, inputs = FEW_CHANNELS if name in INPUT_ROTATIONS else CHANNELS
    layer = Conv(inputs, outputs, 3, padding=1).to(torch.float16).requires_grad_(False)
    nn.init.constant_(layer.weight, BASE_STD)
    x = torch.ones(1, inputs, 32, 32, dtype=dtype)
    assert_law(measured_on(layer, [family(name, (outputs, inputs, 3, 3)).adapter], x, compute))


@pytest.mark.parametrize("name", AT_4096_TOKENS)
def test_the_peak_at_4096_tokens_is_the_one_predicted(name: str) -> None:
    weight = torch.full((OUT, IN), BASE_STD, dtype=torch.float16)
    x = torch.ones(4096, IN, dtype=torch.bfloat16)
    assert_law(measured_on(Linear(weight, OUT), [adapter_for(name)], x, "auto"))


@pytest.mark.parametrize("compute", ["fp16", "fp32"])
@pytest.mark.parametrize("names", [("lora", "lora"), ("lora", "dora-out", "lora"), ("oft", "lora", "ia3-in")])
def test_a_stacks_peak_and_factors_are_those_predicted(names: tuple[str, ...], compute: Compute) -> None:
    weight = torch.full((OUT, IN), BASE_STD, dtype=torch.float16)
    x = torch.ones(512, IN, dtype=torch.bfloat16)
    assert_law(measured_on(Linear(weight, OUT), [adapter_for(name) for name in names], x, compute))


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("name", ["lora", "dora-in", "glora"])
def test_the_prediction_holds_for_every_stored_weight(name: str, stored: str) -> None:
    shape = (256, 512)
    weight = stored_variant(stored, torch.full(shape, BASE_STD))
    layer = Linear(weight.parameter, shape[0], weight.module.scale_weight)
    x = torch.ones(1024, shape[1], dtype=torch.bfloat16)
    assert_law(measured_on(layer, [family(name, shape).adapter], x, "auto"))


@pytest.mark.parametrize("name", ["lora", "lokr-right", "lokr-full"])
@pytest.mark.parametrize("count", [1, 2])
def test_bf16_files_beside_bf16_activations_are_held_once_where_they_can_be(name: str, count: int) -> None:
    sizes = Sizes(tokens=1, inputs=IN, outputs=OUT, rank=16)
    tensors = {key: value.to(torch.bfloat16) for key, value in FILES[name].tensors(sizes).items()}
    (adapter,) = read_adapters(tensors).values()
    weight = torch.full((OUT, IN), BASE_STD, dtype=torch.float16)
    x = torch.ones(512, IN, dtype=torch.bfloat16)
    assert_law(measured_on(Linear(weight, OUT), [adapter] * count, x, "auto"))
