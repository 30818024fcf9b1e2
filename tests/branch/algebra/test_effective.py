"""Law 2: the effective weight is the sequential float64 merge on the decoded base."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, Add, make_lora
from lib_precision_lora.branch import EffectiveWeight, Patch
from lib_precision_lora.branch.session.compose import effective_weights
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.storage import stored_weight
from tests.branch.hosts import Holder, stored_holder
from tests.branch.recipes import BASE_STD, EIGHT_MIXED, RECIPES, generator, noise, recipe
from tests.oracles import Step, merge, swap_halves
from tests.storage.formats import VARIANTS, stored_variant

SHAPE = (24, 256)
MATRIX = noise(SHAPE, generator(7), BASE_STD)
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3}


def deltas(holder: Holder, patches: list[Patch]) -> dict[torch.dtype, Tensor]:
    (pair,) = effective_weights(holder, patches, FittedAdapters()).values()
    return {dtype: pair[1].delta(dtype) for dtype in LIMITS}


def assert_exact(holder: Holder, base: Tensor, pairs: list[tuple[Patch, Step]]) -> None:
    weight, size = merge(base, [step for _, step in pairs])
    assert size > 0.0
    for dtype, delta in deltas(holder, [patch for patch, _ in pairs]).items():
        error = float((delta.double() - (weight - base.double())).norm()) / size
        assert error <= LIMITS[dtype], f"{dtype}: {error:.2e}"


@pytest.mark.parametrize("stored", VARIANTS)
def test_every_adapter_on_every_stored_weight_is_the_float64_merge(stored: str) -> None:
    holder, case = stored_holder(stored, MATRIX)
    for name in RECIPES:
        assert_exact(holder, case.expected, [recipe(name, SHAPE).patch("layer.weight", 0.8)])


@pytest.mark.parametrize("stored", VARIANTS)
def test_eight_stacked_adapters_on_every_stored_weight_are_the_float64_merge(stored: str) -> None:
    holder, case = stored_holder(stored, MATRIX)
    pairs = [
        recipe(name, SHAPE, seed).patch("layer.weight", strength)
        for seed, (name, strength) in enumerate(
            zip(EIGHT_MIXED, (1.0, -0.5, 0.7, 1.3, -1.0, 0.25, 2.0, 0.9), strict=True)
        )
    ]
    assert_exact(holder, case.expected, pairs)
    halves = [recipe(name, (8, 256), 9).patch("layer.weight", 1.0, (8, 8)) for name in EIGHT_MIXED[:4]]
    assert_exact(holder, case.expected, pairs[:4] + halves)


applications = st.tuples(
    st.sampled_from(list(RECIPES)),
    st.floats(-2.0, 2.0).filter(lambda strength: abs(strength) > 0.01),
    st.sampled_from([None, (0, 8), (8, 8), (4, 10), (20, 4)]),
    st.sampled_from([None, swap_halves]),
    st.sampled_from([1.0, 1.0, 0.5, 1.7]),
)


@settings(max_examples=40, deadline=None)
@given(stack=st.lists(applications, min_size=1, max_size=8), stored=st.sampled_from(VARIANTS))
def test_any_stack_of_offsets_row_functions_and_base_factors_is_the_float64_merge(
    stack: list[tuple[str, float, tuple[int, int] | None, object, float]], stored: str
) -> None:
    holder, case = stored_holder(stored, MATRIX)
    pairs = []
    for seed, (name, strength, rows, function, factor) in enumerate(stack):
        shape = (rows[1] if rows else SHAPE[0], SHAPE[1])
        pairs.append(recipe(name, shape, seed).patch("layer.weight", strength, rows, function, factor))
    assert_exact(holder, case.expected, pairs)


CONV_ADAPTERS = ("lora-rank-8-fp16", "tucker-rank-4", "tucker-rank-2-fp16", "diff-bf16", "set-fp16")


@pytest.mark.parametrize("name", CONV_ADAPTERS)
@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (5,), (2, 3, 2)])
def test_convolution_kernels_are_the_float64_merge(name: str, kernel: tuple[int, ...]) -> None:
    shape = (12, 8, *kernel)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(noise(shape, generator(3), BASE_STD))
    assert_exact(Holder(layer), layer.weight, [recipe(name, shape).patch("layer.weight", -0.6)])


@pytest.mark.parametrize("length", [1, 7])
def test_vectors_are_the_float64_merge(length: int) -> None:
    layer = torch.nn.Module()
    layer.bias = torch.nn.Parameter(noise((length,), generator(4), BASE_STD))
    for name in ("diff-fp32", "diff-bf16", "set-fp16"):
        pairs = [
            recipe(name, (length,)).patch("layer.bias", 0.3),
            recipe("diff-fp32", (length,), 1).patch("layer.bias"),
        ]
        assert_exact(Holder(layer), layer.bias, pairs)


def test_the_same_adapter_twice_adds_up() -> None:
    weight = EffectiveWeight.identity(stored_weight(MATRIX))
    one = recipe("lora-rank-8-fp16", SHAPE)
    assert one.delta is not None
    twice = weight.apply(one.adapter, 0.5).apply(one.adapter, 0.5).delta(torch.float64)
    torch.testing.assert_close(twice, one.delta, rtol=1e-12, atol=1e-15)


def test_set_takes_away_what_came_before_and_keeps_what_comes_after() -> None:
    weight = EffectiveWeight.identity(stored_weight(MATRIX))
    before, value, after = (recipe(name, SHAPE) for name in ("diff-fp32", "set-fp16", "lora-rank-1"))
    assert value.value is not None
    assert after.delta is not None
    stacked = weight.apply(before.adapter).apply(value.adapter, 0.1).apply(after.adapter, 2.0)
    expected = value.value + 2.0 * after.delta - MATRIX.double()
    torch.testing.assert_close(stacked.delta(torch.float64), expected, rtol=1e-12, atol=1e-12)


def test_identity_has_no_delta_and_apply_leaves_it_as_it_was() -> None:
    weight = EffectiveWeight.identity(stored_weight(MATRIX))
    assert weight.is_identity
    changed = weight.apply(recipe("lora-rank-1", SHAPE).adapter)
    assert weight.is_identity
    assert not changed.is_identity
    assert float(weight.delta().norm()) == 0.0
    assert weight.delta().shape == SHAPE


def test_a_stack_holds_the_files_own_tensors_and_no_copies() -> None:
    adapter = recipe("lora-rank-16-bf16", SHAPE).adapter
    weight = EffectiveWeight.identity(stored_weight(MATRIX)).apply(adapter).apply(adapter, 2.0, None)
    assert len(weight.steps) == 2
    held = {id(tensor) for step in weight.steps if isinstance(step, Add) for tensor in step.term.tensors()}
    assert held == {id(tensor) for tensor in adapter.tensors()}


def test_delta_reads_a_large_weight_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_precision_lora.branch.algebra.reading.BLOCK_BYTES", 8 * 256 * 5)
    case = stored_variant("gguf-Q4_0", MATRIX)
    value, term = recipe("set-fp16", SHAPE), recipe("lora-rank-4-without-alpha", (10, 256))
    weight = EffectiveWeight.identity(stored_weight(case.parameter)).apply(value.adapter)
    weight = weight.apply(term.adapter, 1.0, (3, 10))
    expected, _ = merge(case.expected, [Step(value.change()), Step(term.change(), rows=(3, 10))])
    torch.testing.assert_close(weight.delta(torch.float64), expected - case.expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(0, 25), (-1, 4), (24, 1), (3, 0)])
def test_rows_outside_of_the_weight_are_refused_with_the_numbers(rows: tuple[int, int]) -> None:
    weight = EffectiveWeight.identity(stored_weight(MATRIX))
    adapter = recipe("lora-rank-1", (max(1, rows[1]), 256)).adapter
    with pytest.raises(AdapterError, match=rf"{rows[0]} to {sum(rows)} .*24"):
        weight.apply(adapter, 1.0, rows)
    with pytest.raises(AdapterError, match=rf"{rows[0]} to {sum(rows)} .*24"):
        weight.scaled(0.5, rows)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_strengths_and_factors_that_are_not_finite_are_refused(number: float) -> None:
    weight = EffectiveWeight.identity(stored_weight(MATRIX))
    with pytest.raises(AdapterError, match=str(number)):
        weight.apply(recipe("lora-rank-1", SHAPE).adapter, number)
    with pytest.raises(AdapterError, match=str(number)):
        weight.scaled(number)


@pytest.mark.parametrize("imbalance", [2.0**-20, 2.0**20])
def test_ranks_of_very_different_sizes_keep_the_fp16_figure(imbalance: float) -> None:
    g = generator(5)
    spread = torch.tensor([1.0, 1.0, imbalance, imbalance])
    up, down = noise((24, 4), g) * spread, noise((4, 256), g) / spread[:, None]
    weight = EffectiveWeight.identity(stored_weight(MATRIX)).apply(make_lora("layer", up, down))
    expected = up.double() @ down.double()
    assert float((weight.delta(torch.float16).double() - expected).norm() / expected.norm()) <= 1e-3
