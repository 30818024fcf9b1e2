"""The host's patch values: made for others to read, and read where they are understood."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import (
    AdapterError,
    Assign,
    Diff,
    LoRA,
    adapter_bytes,
    from_forge_patch,
    make_lora,
    read_adapters,
    to_forge_patch,
)
from tests.oracles import lora_delta

G = torch.Generator().manual_seed(1)
UP, DOWN = torch.randn(6, 2, generator=G), torch.randn(2, 5, generator=G)
CONV_UP, CONV_DOWN = torch.randn(6, 2, 1, 1, generator=G), torch.randn(2, 5, 3, 3, generator=G)
CORE, INNER = torch.randn(2, 3, 3, 3, generator=G), torch.randn(3, 5, 1, 1, generator=G)


def forge_merge(value: tuple, weight: Tensor, strength: float) -> Tensor:
    """What stock Forge's `merge_lora_to_weight` does with a value of these kinds, in float64."""
    if len(value) == 1:
        value = ("diff", value)
    kind, content = value
    if kind == "diff":
        return weight + strength * content[0].double()
    if kind == "set":
        return content[0].double().expand_as(weight).clone()
    up, down, alpha, mid, dora_scale = content
    assert kind == "lora"
    assert dora_scale is None
    return weight + strength * lora_delta(up, down, alpha, weight.shape, mid)


VALUES = {
    "lora": (("lora", (UP, DOWN, 1.0, None, None)), (6, 5)),
    "lora without alpha": (("lora", (UP, DOWN, None, None, None)), (6, 5)),
    "lora with another alpha": (("lora", (UP.half(), DOWN.bfloat16(), 3.7, None, None)), (6, 5)),
    "locon": (("lora", (CONV_UP, CONV_DOWN, 4.0, None, None)), (6, 5, 3, 3)),
    "tucker": (("lora", (CONV_UP, INNER, 6.0, CORE, None)), (6, 5, 3, 3)),
    "diff": (("diff", (torch.randn(6, 5, generator=G),)), (6, 5)),
    "diff without a kind": ((torch.randn(6, generator=G),), (6,)),
    "set": (("set", (torch.randn(6, 5, generator=G),)), (6, 5)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_of_the_host_and_its_way_back_mean_the_same_to_the_host(name: str) -> None:
    value, shape = VALUES[name]
    adapter = from_forge_patch("layer", value)
    assert adapter is not None
    adapter.check(shape)
    back = to_forge_patch(adapter)
    weight = torch.randn(shape, dtype=torch.float64, generator=G)
    for strength in (1.0, -0.5):
        expected = forge_merge(value, weight, strength)
        torch.testing.assert_close(forge_merge(back, weight, strength), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(back, tuple)
    assert from_forge_patch("layer", back) is adapter


def test_the_kinds_are_the_adapters() -> None:
    kinds = {name: type(from_forge_patch("layer", value)) for name, (value, _) in VALUES.items()}
    assert {kinds["lora"], kinds["locon"], kinds["tucker"]} == {LoRA}
    assert {kinds["diff"], kinds["diff without a kind"]} == {Diff}
    assert kinds["set"] is Assign


@pytest.mark.parametrize(
    "value",
    [
        ("glora", (UP, DOWN, UP, DOWN, None, None)),
        ("fooocus", (UP, DOWN, DOWN)),
        ["layer", (UP,)],
        None,
        "lora",
        (),
        ("lora", (UP,), (DOWN,)),
    ],
    ids=["glora", "fooocus", "list", "None", "string", "empty", "three"],
)
def test_what_is_not_understood_is_left_to_the_host(value: object) -> None:
    assert from_forge_patch("layer", value) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (("lora", (UP, torch.ones(3, 5), 1.0, None, None)), "layer: .*rank 2 .*rank 3"),
        (("lora", (UP, DOWN * float("nan"), 1.0, None, None)), "layer: lora_down holds 10 .* of 10"),
        (("lora", (UP, DOWN, float("nan"), None, None)), "layer: alpha is nan"),
        (("diff", (UP.int(),)), "layer: .*int32"),
        ((UP * float("inf"),), "layer: diff holds 12 .* of 12"),
        (("set", (UP * float("inf"),)), "layer: set_weight holds 12 .* of 12"),
    ],
)
def test_a_damaged_value_is_refused_by_name(value: object, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        from_forge_patch("layer", value)


def test_adapters_count_the_bytes_they_hold() -> None:
    assert adapter_bytes(make_lora("layer", UP.half(), DOWN)) == 12 * 2 + 10 * 4
    adapters = read_adapters({"a.diff": UP, "b.set_weight": DOWN.bfloat16()})
    assert [adapter_bytes(adapter) for adapter in adapters.values()] == [48, 20]
