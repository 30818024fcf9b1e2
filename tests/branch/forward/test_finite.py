"""Law 3: no branch adds a value that is not finite where the base output and the sum are representable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.adapters import make_lora, read_adapters
from lib_precision_lora.branch import Compute, EffectiveWeight, PatchSession
from lib_precision_lora.branch.arithmetic.product import HalfProduct, magnitude
from lib_precision_lora.storage import stored_weight
from tests.branch.hosts import Holder
from tests.branch.recipes import generator, noise

pytestmark = pytest.mark.usefixtures("arithmetic")

OUT, IN, RANK = 96, 64, 4
MODES = ("auto", "fp16", "fp32")
COMPUTE = pytest.mark.parametrize("compute", MODES)
EXTREMES = [(1e30, 1e-30), (1e-30, 1e30), (1e4, 1e-4), (1.0, 1.0)]


def factors(up: float, down: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Factors whose product has elements of about 0.1 · up · down."""
    g = generator(1)
    return (noise((OUT, RANK), g) * up * 0.2).to(dtype), (noise((RANK, IN), g) * down * 0.2).to(dtype)


def patched(layer: nn.Module, x: Tensor, compute: Compute, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    adapters = [("file", {"layer": make_lora("layer", up, down)}, 1.0) for up, down in pairs]
    with PatchSession(holder := Holder(layer)) as session:
        session.apply(adapters, compute)
        return holder(x)


def assert_finite_and_right(y: Tensor, exact: Tensor) -> None:
    """Finite, and within the fp16 figure of the branch and the roundings of the output's type."""
    assert torch.isfinite(exact.to(y.dtype)).all()
    assert torch.isfinite(y).all()
    limits = torch.finfo(y.dtype)
    step = limits.smallest_normal * limits.eps * y.numel() ** 0.5
    assert float((y.double() - exact).norm()) <= max(2e-3, 2.0 * limits.eps) * float(exact.norm()) + step


@COMPUTE
@pytest.mark.parametrize(("up", "down"), EXTREMES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 1.0),
        (torch.float16, 6e-8),
        (torch.float16, 2000.0),
        (torch.bfloat16, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 7e4),
        (torch.float32, 1e30),
        (torch.float32, 3e5),
    ],
)
def test_factors_and_activations_at_the_edges_of_their_ranges(
    compute: Compute, up: float, down: float, dtype: torch.dtype, size: float
) -> None:
    layer = nn.Linear(IN, OUT, bias=False)
    layer.weight.data = noise((OUT, IN), generator(2), 0.05)
    layer = layer.to(dtype)
    x = (noise((8, IN), generator(3)) * size).to(dtype)
    pair = factors(up, down)
    weight = layer.weight.double() + pair[0].double() @ pair[1].double()
    with torch.no_grad():
        assert torch.isfinite(layer(x)).all()
        assert_finite_and_right(patched(layer, x, compute, pair), x.double() @ weight.T)


@COMPUTE
def test_inputs_at_the_largest_fp16_number_that_cancel_in_the_sum(compute: Compute) -> None:
    layer = nn.Linear(IN, OUT, bias=False).half().requires_grad_(False)
    layer.weight.data.fill_(2.0**-10)
    x = torch.full((3, IN), 65504.0).half()
    x[:, 1::2] *= -1
    down = torch.ones(RANK, IN).bfloat16()
    down[:, 1::2] = -1
    up = torch.full((OUT, RANK), 2.0**-12).bfloat16()
    exact = x.double() @ (layer.weight.double() + up.double() @ down.double()).T
    assert float(exact.abs().max()) < 65504
    with torch.no_grad():
        assert_finite_and_right(patched(layer, x, compute, (up, down)), exact)


@COMPUTE
def test_a_deep_stack_whose_parts_overflow_fp16_alone_but_not_together(compute: Compute) -> None:
    layer = nn.Linear(IN, OUT, bias=False).half().requires_grad_(False)
    layer.weight.data.zero_()
    x = torch.full((3, IN), 500.0).half()
    up, down = torch.ones(OUT, RANK), torch.ones(RANK, IN)
    nearly = up * 1.25
    exact = x.double() @ (down.double().T @ (nearly - up).double().T)
    assert float(x.double().amax() * IN * RANK) > 65504
    with torch.no_grad():
        y = patched(layer, x, compute, (nearly, down), (up, -down))
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y.double(), exact, rtol=5e-3, atol=0)


@COMPUTE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("up", "down"), EXTREMES)
def test_convolutions_at_the_edges(compute: Compute, dtype: torch.dtype, up: float, down: float) -> None:
    size = 2000.0 if dtype == torch.float16 else 1e30
    layer = nn.Conv2d(IN // 4, OUT, 3, bias=False)
    layer.weight.data = noise((OUT, IN // 4, 3, 3), generator(2), 0.05)
    layer = layer.to(dtype)
    x = (noise((2, IN // 4, 6, 6), generator(3)) * size).to(dtype)
    up_factor = (noise((OUT, RANK), generator(4)) * up * 0.2).bfloat16()
    down_factor = (noise((RANK, IN // 4, 3, 3), generator(5)) * down * 0.2).bfloat16()
    delta = (up_factor.double() @ down_factor.double().flatten(1)).view(OUT, IN // 4, 3, 3)
    exact = nn.functional.conv2d(x.double(), layer.weight.double() + delta)
    with torch.no_grad():
        assert torch.isfinite(layer(x)).all()
        assert_finite_and_right(patched(layer, x, compute, (up_factor, down_factor)), exact)


@pytest.mark.parametrize(("up", "down"), EXTREMES)
def test_the_effective_delta_of_extreme_factors_in_every_arithmetic(up: float, down: float) -> None:
    pair = factors(up, down)
    weight = EffectiveWeight.identity(stored_weight(torch.zeros(OUT, IN))).apply(make_lora("layer", *pair))
    exact = pair[0].double() @ pair[1].double()
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3)):
        assert float((weight.delta(dtype).double() - exact).norm() / exact.norm()) <= limit


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.integers(-126, 127),
    spread=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_half_product_of_any_finite_input_is_finite(exponent: int, spread: int, dtype: torch.dtype) -> None:
    g = generator(abs(exponent))
    powers = torch.randint(-spread, 1, (5, IN), generator=g).double()
    x = torch.rand((5, IN), generator=g).double() * torch.exp2(powers + exponent)
    x = x.to(dtype)
    w = torch.full((3, IN), 2.0**15 / IN).half()
    result = HalfProduct()(nn.functional.linear, x, w, (-1,))
    exact = x.double() @ w.double().T
    fits = exact.abs() < torch.finfo(torch.float32).max
    assert fits.any() or exponent > 100
    assert torch.isfinite(result[fits]).all()
    assert torch.allclose(result.double()[fits], exact[fits], rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_magnitude_bounds_every_number_of_a_type(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.tensor([0.0, limits.smallest_normal, 1.0, 1.5, -2.0, limits.max], dtype=dtype)[:, None]
    x = torch.cat([x, torch.zeros_like(x)], dim=1)
    size = magnitude(x, (-1,))
    assert torch.isfinite(size).all()
    assert (size > 0).all()
    assert (size == torch.exp2(torch.log2(size).round())).all()
    assert ((x.float() / size).abs() <= 2.0).all()
    assert (size[1:5, 0] / x[1:5, 0].float().abs() < 2.0).all()


@pytest.mark.parametrize("size", [6e-8, 0.01, 1.0, 16.0, 31.0, 1000.0, 60000.0])
@pytest.mark.parametrize("change", [1e-4, 0.01, 1.0])
def test_turned_inputs_of_cancelling_rows_stay_within_fp16_and_are_right(size: float, change: float) -> None:
    """Rows of absolute sum 1900 that sum to 0: a changed half of the inputs is all that comes out."""
    layer = nn.Linear(1024, 8).half().requires_grad_(False)
    signs = torch.tensor([1.0, -1.0]).repeat(512)
    layer.weight.copy_(1900 / 1024 * signs.expand(8, 1024))
    layer.bias.copy_(torch.linspace(-1.0, 1.0, 8))
    values = torch.where(signs > 0, change, 0.0)
    adapter = read_adapters({"layer.weight": values, "layer.on_input": torch.tensor(1)})["layer"]
    x = torch.full((3, 1024), size).half()
    weight = layer.weight.double() * (1.0 + values.double())
    exact = x.double() @ weight.T + layer.bias.double()
    with PatchSession(holder := Holder(layer)) as session:
        session.apply([("file", {"layer": adapter}, 1.0)])
        y = holder(x)
    if torch.isfinite(exact.half()).all():
        assert_finite_and_right(y, exact)
    else:
        assert size * change >= 60.0
