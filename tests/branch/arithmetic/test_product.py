"""The products of the compute modes, and TF32, which a CPU can only simulate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.arithmetic.factors import (
    DOWN_SUM_BOUND,
    UP_SUM_BOUND,
    balanced_factors,
    half_factors,
)
from lib_precision_lora.branch.arithmetic.product import HalfProduct, SingleProduct, choose_product
from lib_precision_lora.branch.forward import conv
from lib_precision_lora.branch.forward import linear as linear_module
from lib_precision_lora.strict_product import split_product
from tests.branch.hosts import Holder
from tests.branch.recipes import generator, noise, recipe

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def as_tensor_float(x: Tensor) -> Tensor:
    """fp32 rounded to nearest to TF32: 10 bits of mantissa, 13 fewer than fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def tensor_float_linear(x: Tensor, w: Tensor) -> Tensor:
    return linear(as_tensor_float(x), as_tensor_float(w))


def tensor_float_conv(x: Tensor, w: Tensor) -> Tensor:
    return conv2d(as_tensor_float(x), as_tensor_float(w))


def relative(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e15])
def test_the_split_keeps_fp32_accuracy_where_operands_are_rounded_to_tf32(size: float) -> None:
    x, w = noise((64, 512), generator(1)) * size, noise((32, 512), generator(2))
    exact = x.double() @ w.double().T
    assert relative(split_product(tensor_float_linear, x, w), exact) <= 1e-6
    assert relative(tensor_float_linear(x, w), exact) > 1e-4
    x, w = noise((2, 16, 9, 9), generator(3)) * size, noise((8, 16, 3, 3), generator(4))
    exact = conv2d(x.double(), w.double())
    assert relative(split_product(tensor_float_conv, x, w), exact) <= 1e-6
    assert relative(tensor_float_conv(x, w), exact) > 1e-4


def test_the_split_takes_inputs_of_any_strides() -> None:
    x, w = noise((512, 64), generator(1)).T, noise((512, 32), generator(2)).T
    assert relative(split_product(tensor_float_linear, x, w), x.double() @ w.double().T) <= 1e-6


def test_every_product_of_a_forward_is_one_of_the_two_arithmetics(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a bare `linear` would be rounded to TF32 where the process allows that."""
    running = 0

    def inside(call: object) -> object:
        def run(*args: object) -> object:
            nonlocal running
            running += 1
            try:
                return call(*args)
            finally:
                running -= 1

        return run

    products = 0

    def counted(call: object) -> object:
        def run(*args: object) -> object:
            nonlocal products
            assert running, "a product outside of the two arithmetics"
            products += 1
            return call(*args)

        return run

    for kind in (SingleProduct, HalfProduct):
        monkeypatch.setattr(kind, "__call__", inside(kind.__call__))
    monkeypatch.setattr(linear_module, "linear", counted(linear))
    monkeypatch.setattr("lib_precision_lora.branch.forward.rows.linear", counted(linear))
    monkeypatch.setitem(conv._CONVOLVE, 2, counted(conv2d))
    layers = {
        "linear": (nn.Linear(8, 12), (12, 8), torch.ones(2, 8)),
        "conv": (nn.Conv2d(8, 12, 3), (12, 8, 3, 3), torch.ones(2, 8, 4, 4)),
    }
    for layer, shape, x in layers.values():
        before = products
        for compute in ("auto", "fp16"):
            with PatchSession(holder := Holder(layer)) as session:
                names = ("lora-rank-1", "diff-bf16")
                session.apply_patches(
                    [recipe(name, shape).patch("layer.weight")[0] for name in names], compute
                )
                holder(x)
        assert products > before


def test_automatic_is_fp16_only_for_fp16_on_an_accelerator() -> None:
    chosen = {
        (compute, device, dtype): choose_product(compute, device, dtype).half
        for compute in ("auto", "fp16", "fp32")
        for device in (CPU, CUDA)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    half = {case for case, is_half in chosen.items() if is_half}
    assert {case for case in half if case[0] == "auto"} == {("auto", CUDA, torch.float16)}
    assert sum(case[0] == "fp16" for case in half) == 6
    assert not any(case[0] == "fp32" for case in half)


sizes = st.floats(-60.0, 60.0)


@settings(max_examples=60, deadline=None)
@given(up_size=sizes, down_size=sizes, rank=st.integers(1, 9), stacked=st.integers(1, 8))
def test_half_factors_bound_their_sums_and_keep_the_product(
    up_size: float, down_size: float, rank: int, stacked: int
) -> None:
    up = noise((20, rank), generator(rank)) * 2.0**up_size
    down = noise((rank, 30), generator(rank + 1)) * 2.0**down_size
    factors = half_factors(up, down, stacked)
    assert factors.up.dtype == factors.down.dtype == torch.float16
    assert float(factors.down.double().abs().sum(1).max()) <= DOWN_SUM_BOUND * 1.001
    assert float(factors.up.double().abs().sum(1).max()) <= UP_SUM_BOUND / stacked * 1.001
    exact = up.double() @ down.double()
    if abs(up_size + down_size) < 100:
        assert relative(factors.product(), exact) <= 1e-3


@settings(max_examples=40, deadline=None)
@given(up_size=sizes, down_size=sizes, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_balanced_factors_lose_nothing(up_size: float, down_size: float, dtype: torch.dtype) -> None:
    up = (noise((20, 3), generator(1)) * 2.0**up_size).to(dtype)
    down = (noise((3, 30), generator(2)) * 2.0**down_size).to(dtype)
    factors = balanced_factors(up, down)
    exact = up.double() @ down.double()
    product = (factors.up.double() * factors.scale.double()) @ factors.down.double()
    assert relative(product, exact) <= 1e-12
    for factor in (factors.up, factors.down):
        assert 2.0**-45 < float(factor.abs().max()) < 2.0**45


def test_zero_factors_stay_zero() -> None:
    zero, one = torch.zeros(4, 2), torch.ones(2, 5)
    for factors in (half_factors(zero, one), balanced_factors(zero, one), half_factors(one.T, zero.T)):
        product = (factors.up.float() * factors.scale) @ factors.down.float()
        assert torch.isfinite(factors.scale).all()
        assert not product.any()
