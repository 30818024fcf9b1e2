"""Law 2 in a forward: the output of a patched linear layer errs at most 1.5 times as one ideal rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, PatchError, PatchSession
from lib_precision_lora.branch.forward import weight_branch
from tests.branch.forwards import Pairs, assert_exact_forward, exact_layer, forward
from tests.branch.hosts import Holder, Linear
from tests.branch.recipes import BASE_STD, EIGHT_MIXED, RECIPES, generator, noise, recipe
from tests.oracles import allowed_error, merge, rounding_error, swap_halves
from tests.storage.formats import VARIANTS, stored_variant

OUT, IN = 48, 64
pytestmark = pytest.mark.usefixtures("arithmetic")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES = ("auto", "fp16", "fp32")
ACTIVATIONS = pytest.mark.parametrize("dtype", TYPES, ids=str)
COMPUTE = pytest.mark.parametrize("compute", MODES)


def linear(dtype: torch.dtype, bias: bool = True, out: int = OUT) -> nn.Linear:
    layer = nn.Linear(IN, out, bias=bias)
    layer.weight.data = noise((out, IN), generator(1), BASE_STD)
    if bias:
        layer.bias.data = noise((out,), generator(2), 0.1)
    return layer.to(dtype).requires_grad_(False)


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return noise((*shape, IN), generator(3)).to(dtype)


def one(name: str, strength: float = 1.0, **options: object) -> Pairs:
    return {"weight": [recipe(name, (OUT, IN)).patch("layer.weight", strength, **options)]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@COMPUTE
def test_a_wide_layer_errs_at_most_one_and_a_half_times_as_one_rounding(
    dtype: torch.dtype, compute: Compute
) -> None:
    pairs = {"weight": [recipe("lora-rank-16-bf16", (1536, IN)).patch("layer.weight")]}
    result = forward(linear(dtype, out=1536), pairs, tokens(dtype, 64), compute)
    assert result.error <= 1.5 * rounding_error(result.exact, dtype)


@ACTIVATIONS
@COMPUTE
@pytest.mark.parametrize("name", RECIPES)
def test_one_adapter(dtype: torch.dtype, compute: Compute, name: str) -> None:
    assert_exact_forward(linear(dtype), one(name, 0.9), tokens(dtype, 40), compute)


@ACTIVATIONS
@COMPUTE
def test_eight_stacked_with_a_bias_and_offsets(dtype: torch.dtype, compute: Compute) -> None:
    strengths = (0.5, -0.3, 0.4, 0.3, -0.4, 0.25, 0.3, 0.2)
    stack = [
        recipe(name, (OUT, IN), seed).patch("layer.weight", strengths[seed])
        for seed, name in enumerate(EIGHT_MIXED)
    ]
    stack += [recipe("lora-rank-1", (16, IN), 8).patch("layer.weight", 0.5, (8, 16), swap_halves)]
    bias = [recipe("diff-bf16", (OUT,)).patch("layer.bias", 3.0)]
    assert_exact_forward(linear(dtype), {"weight": stack, "bias": bias}, tokens(dtype, 40), compute)


@ACTIVATIONS
@COMPUTE
def test_parts_of_a_fused_weight_in_any_order(dtype: torch.dtype, compute: Compute) -> None:
    parts = {"q": (0, 16), "k": (16, 16), "v": (32, 16), "qk": (0, 32), "kv": (16, 32), "qkv": None}
    names = ("lora-rank-1", "lora-rank-8-fp16", "lora-rank-4-without-alpha", "lora-rank-16-bf16")
    for order in (("q", "k", "v"), ("v",), ("qk", "q", "qkv"), ("v", "qkv", "q"), ("k", "qk", "kv", "k")):
        stack = [
            recipe(name, (parts[part][1] if parts[part] else OUT, IN), seed).patch(
                "layer.weight", 0.5, parts[part]
            )
            for seed, (name, part) in enumerate(zip(names, order, strict=False))
        ]
        assert len(stack) == len(order)
        assert_exact_forward(linear(dtype), {"weight": stack}, tokens(dtype, 40), compute)


@ACTIVATIONS
@pytest.mark.parametrize("bias", [True, False])
def test_base_factor_and_set_keep_the_bias_out(dtype: torch.dtype, bias: bool) -> None:
    layer = linear(dtype, bias)
    for pairs in (
        one("lora-rank-4-without-alpha", 1.0, factor=0.6),
        one("set-fp16"),
        {"weight": [recipe("set-fp16", (16, IN)).patch("layer.weight", 1.0, (16, 16))]},
    ):
        assert_exact_forward(layer, pairs, tokens(dtype, 40))


@ACTIVATIONS
@COMPUTE
def test_a_bias_alone(dtype: torch.dtype, compute: Compute) -> None:
    for name in ("diff-fp32", "set-fp16"):
        pairs = {"bias": [recipe(name, (OUT,)).patch("layer.bias", 2.0)]}
        result = forward(linear(dtype), pairs, tokens(dtype, 40), compute)
        assert result.error <= result.allowed


@ACTIVATIONS
@COMPUTE
@pytest.mark.parametrize("shape", [(), (1,), (2, 9), (2, 3, 4)])
def test_inputs_of_any_number_of_axes(dtype: torch.dtype, compute: Compute, shape: tuple[int, ...]) -> None:
    out = 2048  # enough outputs of a single token for its roundings to average
    pairs = {"weight": [recipe("lora-rank-16-bf16", (out, IN)).patch("layer.weight")]}
    assert_exact_forward(linear(dtype, out=out), pairs, tokens(dtype, *shape), compute)


@ACTIVATIONS
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x = tokens(dtype, 3, 5, 7)
    inputs = {
        "swapped tokens": x.transpose(0, 2),
        "every other token": x[:, ::2],
        "expanded": x[:1].expand(4, 5, 7, IN),
        "swapped features": tokens(dtype, IN).T[:, :40].T,
        "sliced features": torch.cat([x, x], dim=-1)[..., IN // 2 : IN // 2 + IN],
    }
    for name, view in inputs.items():
        assert not view.is_contiguous() or name == "swapped features"
        assert_exact_forward(linear(dtype), one("lora-rank-8-fp16"), view)
        assert_exact_forward(linear(dtype), one("diff-fp32"), view)


@COMPUTE
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens_give_no_output_and_no_error(compute: Compute, shape: tuple[int, ...]) -> None:
    for name in ("lora-rank-1", "diff-fp32", "set-fp16"):
        assert (
            forward(linear(torch.float16), one(name), tokens(torch.float16, *shape), compute).patched.numel()
            == 0
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_layer_over_any_stored_weight(name: str) -> None:
    case = stored_variant(name, noise((OUT, IN), generator(1), BASE_STD))
    layer = Linear(case.parameter, case.expected, case.module.scale_weight)
    pairs = [recipe(kind, (OUT, IN)).patch("layer.weight", 0.9) for kind in ("lora-rank-8-fp16", "diff-bf16")]
    weight, _ = merge(case.expected, [step for _, step in pairs])
    for dtype in TYPES:
        x = tokens(dtype, 40)
        exact_base, exact = (x.double() @ w.double().T + layer.bias.double() for w in (case.expected, weight))
        base_in_type = x.double() @ case.expected.to(dtype).double().T + layer.bias.to(dtype).double()
        host = layer(x)
        with PatchSession(holder := Holder(layer)) as session:
            session.apply_patches([patch for patch, _ in pairs])
            assert session.attached == ("layer",)
            patched = holder(x)
        # the host itself rounds W0 to the activations' type: that is the base's error, not the branch's
        exact += base_in_type - exact_base
        assert float((patched.double() - exact).norm()) <= allowed_error(exact, base_in_type, host)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(8, 70),
    columns=st.integers(8, 90),
    count=st.integers(1, 60),
    names=st.lists(st.sampled_from(EIGHT_MIXED), min_size=1, max_size=4),
    dtype=st.sampled_from(TYPES),
    compute=st.sampled_from(MODES),
)
def test_layers_of_any_shape(
    rows: int, columns: int, count: int, names: list[str], dtype: torch.dtype, compute: Compute
) -> None:
    layer = nn.Linear(columns, rows).requires_grad_(False)
    layer.weight.data = noise((rows, columns), generator(rows), 1.0)
    layer = layer.to(dtype)
    pairs = {
        "weight": [
            recipe(name, (rows, columns), seed).patch("layer.weight", 1.0) for seed, name in enumerate(names)
        ]
    }
    x = noise((count, columns), generator(count)).to(dtype)
    result = forward(layer, pairs, x, compute)
    if compute == "fp16" and dtype == torch.float32:
        assert result.delta_error <= 1e-3 * len(names) ** 0.5 * 2
    else:
        assert result.error <= 1.2 * result.allowed


@COMPUTE
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 3)])
def test_the_smallest_layers(compute: Compute, shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    for name in RECIPES:
        pairs = {"weight": [recipe(name, shape).patch("layer.weight")]}
        result = forward(layer, pairs, torch.ones(3, shape[1]), compute)
        assert result.error <= 1e-4


def test_many_chunks_and_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = {
        "weight": [
            recipe("lora-rank-8-fp16", (OUT, IN)).patch("layer.weight"),
            recipe("diff-fp32", (OUT, IN)).patch("layer.weight"),
            recipe("lora-rank-1", (16, IN)).patch("layer.weight", 1.0, (8, 16)),
        ]
    }
    for module in ("memory.chunks", "branch.forward.rows"):
        monkeypatch.setattr(f"lib_precision_lora.{module}.WORKSPACE_BYTES", 4096)
    monkeypatch.setattr("lib_precision_lora.branch.forward.rows.DENSE_BLOCK_BYTES", 4 * IN * 5)
    for dtype in TYPES:
        assert_exact_forward(linear(dtype), pairs, tokens(dtype, 5, 8))


def test_autocast_does_not_reach_into_the_branch() -> None:
    layer, pairs, x = linear(torch.float32), one("lora-rank-4-without-alpha"), tokens(torch.bfloat16, 40)
    exact_base = exact_layer(linear(torch.bfloat16), {}, {})(x.double())
    exact = exact_base + x.double() @ pairs["weight"][0][1].change(torch.zeros(OUT, IN).double(), 1.0).T
    with torch.autocast("cpu", torch.bfloat16):
        host = layer(x)
        with PatchSession(holder := Holder(layer)) as session:
            session.apply_patches([patch for patch, _ in pairs["weight"]])
            patched = holder(x)
    assert patched.dtype == torch.bfloat16
    assert float((patched.double() - exact).norm()) <= allowed_error(exact, exact_base, host)


def test_an_input_passed_by_keyword_is_seen() -> None:
    layer, x = linear(torch.float32), tokens(torch.float32, 4)
    host = layer(x)
    with PatchSession(holder := Holder(layer)) as session:
        session.apply_patches([patch for patch, _ in one("lora-rank-1")["weight"]])
        assert torch.equal(layer(input=x), holder(x))
        assert not torch.equal(layer(input=x), host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_chosen_once_and_not_in_each_forward(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.ModuleDict({"layer": linear(dtype)}), tokens(dtype, 3)
    with PatchSession(model) as session, torch.no_grad():
        session.apply_patches([recipe("lora-rank-1", (OUT, IN)).patch("layer.weight")[0]])
        session.place(torch.device("cpu"), dtype)
        first = model["layer"](x)
        monkeypatch.setattr(weight_branch, "choose_product", refused)
        assert torch.equal(model["layer"](x), first)
        with pytest.raises(PatchError, match="chosen again"):
            session.place(torch.device("cpu"), torch.float64)


def refused(*asked: object) -> None:
    raise AssertionError("chosen again")
