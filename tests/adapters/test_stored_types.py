"""Every type that a safetensors file may have, in every family: read exactly, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, read_adapters
from lib_precision_lora.branch import EffectiveWeight
from lib_precision_lora.storage import stored_weight
from tests.families import FAMILIES, family
from tests.family import BASE_STD

SHAPE = (16, 12)
FLOATS = ["float64", "float32", "float16", "bfloat16"]
BYTES = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
"""F64 F32 F16 BF16, F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0 of safetensors."""

HALF_A_BYTE = "float4_e2m1fn_x2"


def dtype_of(name: str) -> torch.dtype:
    if not hasattr(torch, name):
        pytest.skip(f"needs a torch that has {name}, and so a file reader that has it")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def stored(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer with its floats in this type, and the same values in fp32."""
    tensors = family(name, SHAPE).tensors
    narrow = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    wide = {key: value.float() if value.is_floating_point() else value for key, value in narrow.items()}
    return narrow, wide


def delta(tensors: dict[str, Tensor]) -> Tensor:
    base = BASE_STD * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    adapter = read_adapters({f"block_7.{key}": value for key, value in tensors.items()})["block_7"]
    adapter.check(SHAPE)
    return EffectiveWeight.identity(stored_weight(base)).apply(adapter).delta(torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", FLOATS + BYTES)
def test_a_family_means_the_same_in_every_type_that_keeps_its_values(name: str, dtype: str) -> None:
    """E8M0 has no zero and no sign: what a rotation of it means is no use, but it is read as it stands."""
    narrow, wide = stored(name, dtype_of(dtype))
    if not all(torch.isfinite(value.float()).all() for value in wide.values()):
        pytest.fail("the type does not hold this family's values")
    expected, actual = delta(wide), delta(narrow)
    assert float((actual - expected).norm()) <= 2e-6 * float(expected.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_floats_of_less_than_a_byte_are_refused_in_one_sentence(name: str) -> None:
    half = dtype_of(HALF_A_BYTE)
    narrow = {
        key: torch.zeros(value.shape, dtype=torch.uint8).view(half) if value.is_floating_point() else value
        for key, value in family(name, SHAPE).tensors.items()
    }
    with pytest.raises(
        AdapterError, match=r"^block_7: \w+ is stored as torch\.float4\w+, .*; save the file in"
    ) as caught:
        delta(narrow)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "bool", "complex64"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_types_are_refused_in_one_sentence(name: str, dtype: str) -> None:
    narrow, _ = stored(name, dtype_of(dtype))
    narrow |= {key: value for key, value in family(name, SHAPE).tensors.items() if key == "on_input"}
    with pytest.raises(
        AdapterError, match=r"^block_7: \w+ (is stored as torch\.\w+|has 1 values of torch)"
    ) as caught:
        delta(narrow)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS + BYTES + ["int64", "int32", "uint8"])
def test_an_alpha_counts_in_every_type(dtype: str) -> None:
    layer = {"lora_up.weight": torch.ones(16, 2), "lora_down.weight": torch.ones(2, 12)}
    alpha = torch.tensor(4.0).to(dtype_of(dtype))
    torch.testing.assert_close(delta(layer | {"alpha": alpha}), torch.full(SHAPE, 4.0).double())
    file = read_adapters({f"a.{key}": value for key, value in (layer | {"alpha": alpha}).items()})
    assert dict(file.alphas) == {"a": 4.0}


@pytest.mark.parametrize("values", [torch.ones(0), torch.ones(2), torch.ones(1, dtype=torch.complex64)])
@pytest.mark.parametrize(("name", "role"), [("ia3-out", "on_input"), ("lora", "alpha"), ("glora", "alpha")])
def test_what_must_be_one_number_is_refused_where_it_is_none(name: str, role: str, values: Tensor) -> None:
    with pytest.raises(AdapterError, match=rf"^block_7: {role} has \d values.*must be one number"):
        delta(family(name, SHAPE).tensors | {role: values})


@pytest.mark.parametrize(
    "on_input", [torch.tensor(True), torch.tensor([1]), torch.ones(1, 1), torch.tensor(1).to(torch.uint8)]
)
def test_a_flag_may_have_any_shape_of_one_element(on_input: Tensor) -> None:
    tensors = family("ia3-in", SHAPE).tensors
    assert torch.equal(delta(tensors | {"on_input": on_input}), delta(dict(tensors)))


INF = torch.tensor(float("inf"))
UNUSED = {
    "alpha beside whole factors": ("lokr-full", {"alpha": INF}),
    "alpha beside whole factors, as ai-toolkit saves it": (
        "lokr-full",
        {"alpha": torch.tensor(9999999999).half()},
    ),
    "several alphas beside whole factors": ("lokr-full", {"alpha": torch.ones(3)}),
    "a factored left side beside a whole one": ("lokr-full", {"lokr_w1_a": INF.expand(2, 2)}),
    "a core beside a whole right side": ("lokr-full", {"lokr_t2": INF.expand(2, 2, 1)}),
    "a core of one half of a LoHa": ("loha", {"hada_t2": INF.expand(3, 3, 1)}),
    "alpha beside a difference": ("diff", {"alpha": INF}),
    "a DoRA scale beside GLoRA": ("glora", {"dora_scale": INF.expand(16, 1)}),
    "a type that cannot be read": ("lokr-full", {"lokr_w1_a": torch.zeros(2, 2, dtype=torch.complex64)}),
}


@pytest.mark.parametrize("case", UNUSED)
def test_a_value_that_is_not_used_is_not_checked(case: str) -> None:
    name, extra = UNUSED[case]
    tensors = dict(family(name, SHAPE).tensors)
    assert torch.equal(delta(tensors | extra), delta(tensors))
    file = read_adapters({f"a.{key}": value for key, value in (tensors | extra).items()})
    assert bool(file.findings) == ("alpha" not in extra)


def test_an_alpha_of_a_factor_that_has_a_rank_is_checked() -> None:
    """The near miss of the whole LoKr."""
    with pytest.raises(AdapterError, match="alpha is inf"):
        delta(family("lokr-right", SHAPE).tensors | {"alpha": INF})
