"""Law 2 for every family: what a stack of any kinds makes of any stored weight is the float64 merge."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.branch import EffectiveWeight, PatchSession
from lib_precision_lora.storage import stored_weight
from tests.branch.hosts import stored_holder
from tests.families import BASE_STD, FAMILIES, OUTPUT_ROTATIONS, Family, family
from tests.oracles import Step, merge
from tests.storage.formats import stored_variant

SHAPE = (16, 64)
STORED = (
    "dense-fp32",
    "dense-fp16",
    "dense-bf16",
    "fp8-e4m3fn",
    "fp8-e5m2-scaled",
    "fp8-e4m3fn-scaled-by-row",
    "bnb-nf4",
    "bnb-fp4-nested",
    "bnb-nf4-in-bf16",
    "gguf-Q4_0",
    "gguf-Q8_0-forge",
    "gguf-Q4_K",
    "gguf-Q8_0-baked-fp16",
)
STRENGTHS = (1.0, 0.7, -0.5, 2.0)
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3}
KERNELS = [(3, 3), (1, 1), (5,)]


def base_matrix(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return BASE_STD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(effective: EffectiveWeight, base: Tensor, steps: list[Step]) -> None:
    weight, size = merge(base, steps)
    assert size > 0.0
    for dtype, limit in LIMITS.items():
        error = float((effective.delta(dtype).double() - (weight - base.double())).norm()) / size
        assert error <= limit, f"{dtype}: {error:.2e}"


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_every_stored_weight_at_every_strength_is_the_float64_merge(
    name: str, stored: str
) -> None:
    case = stored_variant(stored, base_matrix(SHAPE))
    identity = EffectiveWeight.identity(stored_weight(case.parameter, case.module))
    made = family(name, SHAPE)
    adapter = made.adapter
    for strength in STRENGTHS:
        assert_exact(identity.apply(adapter, strength), case.expected, [Step(made.change, strength)])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_a_convolution_is_the_float64_merge(name: str, kernel: tuple[int, ...]) -> None:
    shape = (16, 8, *kernel)
    base, made = base_matrix(shape), family(name, shape)
    identity = EffectiveWeight.identity(stored_weight(nn.Parameter(base, requires_grad=False)))
    for strength in STRENGTHS:
        assert_exact(identity.apply(made.adapter, strength), base, [Step(made.change, strength)])


applications = st.tuples(
    st.sampled_from(list(FAMILIES)),
    st.sampled_from([1.0, 0.7, -0.5, 2.0, 0.01]),
    st.sampled_from([None, None, (0, 8), (8, 8), (4, 12), (2, 4)]),
)


@settings(max_examples=60, deadline=None)
@given(stack=st.lists(applications, min_size=2, max_size=8), stored=st.sampled_from(STORED))
def test_any_stack_of_families_on_any_rows_is_the_float64_merge_in_prompt_order(
    stack: list[tuple[str, float, tuple[int, int] | None]], stored: str
) -> None:
    case = stored_variant(stored, base_matrix(SHAPE))
    effective = EffectiveWeight.identity(stored_weight(case.parameter, case.module))
    steps = []
    for seed, (name, strength, rows) in enumerate(stack):
        made = family(name, (rows[1] if rows else SHAPE[0], SHAPE[1]), seed)
        try:
            effective = effective.apply(made.adapter, strength, rows)
        except AdapterError as error:
            if "rotates as a whole" not in str(error):
                raise
            continue
        steps.append(Step(made.change, strength, rows))
    if steps:
        assert_exact(effective, case.expected, steps)


def forward_error(layer: nn.Module, x: Tensor, applied: list[tuple[Family, float]]) -> float:
    """`‖y − x·W_eff‖ / ‖x·W_eff‖`, the second in float64; the layer as it was again afterwards."""
    weight, _ = merge(layer.weight, [Step(made.change, strength) for made, strength in applied])
    exact = type(layer).__new__(type(layer))
    exact.__dict__.update({**layer.__dict__, "_parameters": {}})
    for name, parameter in layer.named_parameters():
        value = weight if name == "weight" else parameter.double()
        exact.register_parameter(name, nn.Parameter(value, requires_grad=False))
    model = nn.ModuleDict({"layer": layer})
    with torch.no_grad(), PatchSession(model) as session:
        before = layer(x)
        session.apply([("file", {"layer.weight": made.adapter}, strength) for made, strength in applied])
        y = layer(x)
        session.clear()
        assert torch.equal(layer(x), before)
        expected = exact(x.double() if x.is_floating_point() else x)
    assert not torch.equal(y, before)
    return float((y.double() - expected).norm() / expected.norm())


def linear() -> tuple[nn.Module, Tensor]:
    return nn.Linear(64, 16), torch.randn(2, 5, 64)


def conv() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 7, 6)


def conv_1d() -> tuple[nn.Module, Tensor]:
    return nn.Conv1d(8, 16, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(2, 8, 9)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(40, 16), torch.randint(0, 40, (3, 7))


FORWARDS = [(name, make) for make in (linear, conv, conv_1d) for name in FAMILIES] + [
    (name, embedding) for name in FAMILIES if name not in OUTPUT_ROTATIONS
]


@pytest.mark.parametrize(("name", "make"), FORWARDS)
def test_a_forward_multiplies_with_the_merged_weight(name: str, make) -> None:
    torch.manual_seed(3)
    layer, x = make()
    layer.requires_grad_(False)
    layer.weight.mul_(BASE_STD / layer.weight.std())
    made, other = family(name, tuple(layer.weight.shape)), family("dora-out", tuple(layer.weight.shape), 5)
    for applied in ([(made, 1.0)], [(made, -0.5)], [(other, 0.7), (made, 2.0), (other, -0.3)]):
        assert forward_error(layer, x, applied) <= 1e-5


@pytest.mark.parametrize("name", OUTPUT_ROTATIONS)
def test_a_rotation_of_a_vocabulary_is_refused(name: str) -> None:
    layer, _ = embedding()
    model = nn.ModuleDict({"layer": layer.requires_grad_(False)})
    with pytest.raises(AdapterError, match=r"layer\.weight: a rotation of the vocabulary"):
        PatchSession(model).apply([("file", {"layer.weight": family(name, (40, 16)).adapter}, 1.0)])


@pytest.mark.parametrize(
    "name", ["dora-out", "loha-dora-out", "oft", "glora", "ia3-in", "lokr-full", "loha-streamed", "boft-peft"]
)
def test_a_forward_on_every_stored_weight_multiplies_with_the_merged_weight(name: str) -> None:
    for stored in STORED:
        holder, case = stored_holder(stored, base_matrix(SHAPE))
        made, x = family(name, SHAPE), torch.randn(3, 64, generator=torch.manual_seed(2))
        weight, _ = merge(case.expected, [Step(made.change, 0.7)])
        expected = x.double() @ weight.T + holder.layer.bias.double()
        with torch.no_grad(), PatchSession(holder) as session:
            session.apply([("file", {"layer.weight": made.adapter}, 0.7)])
            y = holder(x)
        assert float((y.double() - expected).norm() / expected.norm()) <= 1e-5
