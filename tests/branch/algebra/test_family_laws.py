"""Law 2 for every family: what a stack of any kinds makes of any stored weight is the float64 merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.branch import EffectiveWeight, PatchError, PatchSession
from lib_precision_lora.storage import stored_weight
from tests.branch.hosts import Holder, Linear, RMSNorm
from tests.families import BASE_STD, FAMILIES, INPUT_ROTATIONS, OUTPUT_ROTATIONS, Family, family
from tests.oracles import Step, allowed_error, merge
from tests.storage.formats import VARIANTS, StoredCase, stored_variant

SHAPE = (16, 64)
"""1024 elements: four blocks of a K-quant, whose blocks are the largest."""

STRENGTHS = (1.0, 0.7, -0.5, 2.0)
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3}
KERNELS = {"3x3": (3, 3), "1x1": (1, 1), "5": (5,), "2x3x2": (2, 3, 2)}


def base_matrix(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return BASE_STD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def stored_base(stored: str) -> StoredCase:
    """One base per variant for all cells; it is never written, which the last test shows."""
    return stored_variant(stored, base_matrix(SHAPE))


@dataclass(frozen=True)
class Outputs:
    """host: the layer's own output; patched: with an adapter, by compute mode; both in float64 beside."""

    host: Tensor
    patched: dict[str, Tensor]
    exact_base: Tensor
    exact: Tensor

    @property
    def allowed(self) -> float:
        return allowed_error(self.exact, self.exact_base, self.host)

    def error(self, compute: str) -> float:
        return float((self.patched[compute].double() - self.exact).norm())


def outputs(
    holder: Holder, made: Family, x: Tensor, base: Tensor, weight: Tensor, strength: float = 0.7
) -> Outputs:
    """Forwards of one layer with the adapter; base, weight: its weight without and with it."""
    adapter, patched = made.adapter, {}
    with torch.no_grad(), PatchSession(holder) as session:
        host = holder(x)
        for compute in ("fp32", "fp16"):
            session.apply([("file", {"layer.weight": adapter}, strength)], compute)
            patched[compute] = holder(x)
    multiply = nn.functional.linear if weight.ndim == 2 else nn.functional.conv2d
    exact_base, exact = (
        multiply(x.double(), values.double(), holder.layer.bias.double()) for values in (base, weight)
    )
    return Outputs(host, patched, exact_base, exact)


def assert_exact(effective: EffectiveWeight, base: Tensor, steps: list[Step]) -> None:
    weight, size = merge(base, steps)
    assert size > 0.0
    for dtype, limit in LIMITS.items():
        error = float((effective.delta(dtype).double() - (weight - base.double())).norm()) / size
        assert error <= limit, f"{dtype} at {[step.strength for step in steps]}: {error:.2e}"


@pytest.mark.parametrize("stored", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_every_stored_weight_at_every_strength_is_the_float64_merge(
    name: str, stored: str
) -> None:
    case, made = stored_base(stored), family(name, SHAPE)
    identity = EffectiveWeight.identity(stored_weight(case.parameter, case.module))
    adapter = made.adapter
    for strength in STRENGTHS:
        assert_exact(identity.apply(adapter, strength), case.expected, [Step(made.change, strength)])


@pytest.mark.parametrize("stored", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_forward_of_every_family_on_every_stored_weight_is_that_of_the_merged_weight(
    name: str, stored: str
) -> None:
    case, made = stored_base(stored), family(name, SHAPE)
    holder = Holder(Linear(case.parameter, case.expected, case.module.scale_weight))
    x = torch.randn(40, 64, generator=torch.manual_seed(2))
    weight, _ = merge(case.expected, [Step(made.change, 0.7)])
    result = outputs(holder, made, x, case.expected, weight)
    for compute, limit in (("fp32", 1e-6), ("fp16", 1e-3)):
        allowed = limit * float((result.exact - result.exact_base).norm()) + result.allowed
        assert result.error(compute) <= allowed, compute


def wide_linear() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Linear(256, 192), (64, 256)


def wide_conv() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Conv2d(32, 96, 3), (2, 32, 10, 10)


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [wide_linear, wide_conv])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_wide_layer_errs_at_most_one_and_a_half_times_as_one_rounding(
    name: str, make, dtype: torch.dtype, bias: float
) -> None:
    """Inputs that are rotated run through the module once more, rounded as it rounds: where that pass gives
    ρ times the output, the error is √(2 + 2ρ²) roundings. The strength keeps ρ to what trainings reach."""
    strength = 0.2 if name in INPUT_ROTATIONS else 0.7
    layer, size = make()
    shape = tuple(layer.weight.shape)
    layer.to(dtype).requires_grad_(False)
    layer.weight.copy_(base_matrix(shape))
    layer.bias.copy_(bias * torch.linspace(-1.0, 1.0, shape[0]))
    made, x = family(name, shape), torch.randn(size, generator=torch.manual_seed(2)).to(dtype)
    weight, _ = merge(layer.weight, [Step(made.change, strength)])
    result = outputs(Holder(layer), made, x, layer.weight, weight, strength)
    assert result.error("fp32") <= result.allowed


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_a_convolution_is_the_float64_merge(name: str, kernel: str) -> None:
    shape = (16, 8, *KERNELS[kernel])
    base, made = base_matrix(shape), family(name, shape)
    identity = EffectiveWeight.identity(stored_weight(nn.Parameter(base, requires_grad=False)))
    for strength in STRENGTHS:
        assert_exact(identity.apply(made.adapter, strength), base, [Step(made.change, strength)])


applications = st.tuples(
    st.sampled_from(list(FAMILIES)),
    st.sampled_from([1.0, 0.7, -0.5, 2.0, 0.01]),
    st.sampled_from([None, None, (0, 8), (8, 8), (4, 12), (2, 4)]),
)


@settings(max_examples=100, deadline=None)
@given(stack=st.lists(applications, min_size=2, max_size=8), stored=st.sampled_from(VARIANTS))
def test_any_stack_of_families_on_any_rows_is_the_float64_merge_in_prompt_order(
    stack: Sequence[tuple[str, float, tuple[int, int] | None]], stored: str
) -> None:
    case = stored_base(stored)
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


def conv_2d() -> tuple[nn.Module, Tensor]:
    return nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 7, 6)


def conv_1d() -> tuple[nn.Module, Tensor]:
    return nn.Conv1d(8, 16, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(2, 8, 9)


def conv_3d() -> tuple[nn.Module, Tensor]:
    return nn.Conv3d(8, 16, (1, 3, 2), padding=1, dilation=2), torch.randn(2, 8, 3, 5, 4)


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Embedding(40, 16), torch.randint(0, 40, (3, 7))


FORWARDS = [(name, make) for make in (linear, conv_1d, conv_2d, conv_3d) for name in FAMILIES] + [
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


VECTORS = ("ia3-out", "ia3-peft-out", *OUTPUT_ROTATIONS, "diff")
"""What has a meaning on a norm's weight or a bias: what acts on the outputs, and whole tensors."""


def norm_and_layer() -> nn.ModuleDict:
    model = nn.ModuleDict({"norm": RMSNorm(16), "layer": nn.Linear(8, 16)}).requires_grad_(False)
    model["norm"].scale.copy_(1.0 + base_matrix((16,), 1))
    model["layer"].bias.copy_(base_matrix((16,), 2))
    return model


@pytest.mark.parametrize("name", VECTORS)
def test_a_norm_and_a_bias_take_what_acts_on_outputs(name: str) -> None:
    model, made = norm_and_layer(), family(name, (16,))
    norm, layer = model["norm"], model["layer"]
    x = torch.randn(5, 16, generator=torch.manual_seed(3))
    exact = norm(x.double()) / norm.scale.double() * made.change(norm.scale.double(), 0.7)
    shifted = made.change(layer.bias.double(), 0.7).expand(5, 16)
    with torch.no_grad(), PatchSession(model) as session:
        session.apply([("file", {"norm.scale": made.adapter, "layer.bias": made.adapter}, 0.7)])
        assert float((norm(x).double() - exact).norm() / exact.norm()) <= 1e-6
        assert float((layer(torch.zeros(5, 8)).double() - shifted).norm() / shifted.norm()) <= 1e-6


@pytest.mark.parametrize("parameter", ["norm.scale", "layer.bias"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in VECTORS])
def test_a_norm_and_a_bias_refuse_what_is_made_for_a_matrix(name: str, parameter: str) -> None:
    model = norm_and_layer()
    session = PatchSession(model)
    with pytest.raises(PatchError, match=rf"layer {parameter}: .*(the layer|on a vector)"):
        session.apply([("file", {parameter: family(name, SHAPE).adapter}, 0.7)])


def test_the_shared_bases_have_the_bytes_that_they_were_made_with() -> None:
    for stored in VARIANTS:
        shared, fresh = stored_base(stored), stored_variant(stored, base_matrix(SHAPE))
        assert torch.equal(shared.expected, fresh.expected), stored
        held, made = (
            stored_weight(case.parameter, case.module).dense(torch.float32) for case in (shared, fresh)
        )
        assert torch.equal(held, made), stored
