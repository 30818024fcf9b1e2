"""Where an adapter belongs: parameters, rows of fused ones, and the host's row functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, Target, make_lora, read_adapters, row_order
from tests.oracles import swap_halves

FORMS = {
    "a name": ("a.weight", Target("a.weight")),
    "rows": (("a.weight", (0, 4, 8)), Target("a.weight", (4, 8))),
    "rows and a function": (("a.weight", (0, 4, 8), swap_halves), Target("a.weight", (4, 8), swap_halves)),
    "a function": (("a.weight", None, swap_halves), Target("a.weight", None, swap_halves)),
    "no function": (("a.weight", (0, 0, 8), None), Target("a.weight", (0, 8))),
    "a target": (Target("a.weight", (1, 2)), Target("a.weight", (1, 2))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_hosts_key_map(form: str) -> None:
    value, target = FORMS[form]
    assert Target.parse(value) == target
    assert hash(Target.parse(value)) == hash(target)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_an_offset_on_another_axis_is_refused(axis: int) -> None:
    with pytest.raises(AdapterError, match=rf"a\.weight: an offset on axis {axis}"):
        Target.parse(("a.weight", (axis, 0, 4)))


def test_the_plain_name_where_it_says_all() -> None:
    assert Target("a.weight").name == "a.weight"
    for target in (Target("a.weight", (0, 4)), Target("a.weight", None, swap_halves)):
        assert target.name is target


def test_a_bias_has_the_rows_of_its_weight() -> None:
    assert Target("a.weight", (4, 8), swap_halves).bias() == Target("a.bias", (4, 8), swap_halves)
    assert Target("a").bias() == Target("a.bias")


def reversed_rows(weight: Tensor) -> Tensor:
    return weight.flip(0)


@pytest.mark.parametrize("function", [swap_halves, reversed_rows, lambda weight: weight])
@pytest.mark.parametrize("rows", [2, 12])
def test_a_reordering_of_rows_is_found(function: object, rows: int) -> None:
    order = row_order(function, rows)
    assert order is not None
    for shape in ((rows,), (rows, 3), (rows, 2, 3, 3)):
        values = torch.randn(shape)
        if values.ndim > 1:
            assert torch.equal(values[order], function(values))


def fails(weight: Tensor) -> Tensor:
    raise RuntimeError("not for this weight")


@pytest.mark.parametrize(
    "function",
    [
        lambda weight: weight * 2,
        lambda weight: weight + 1,
        lambda weight: weight[:2],
        lambda weight: weight[[0, 0, 1, 2]],
        lambda weight: weight.mean(0, keepdim=True).expand_as(weight),
        lambda weight: weight.T,
        lambda weight: -weight,
        fails,
    ],
)
def test_arithmetic_is_not_taken_for_a_reordering(function: object) -> None:
    assert row_order(function, 4) is None


@pytest.mark.parametrize("key", ["diff", "set_weight"])
def test_reordered_adapters_are_those_of_the_reordered_weight(key: str) -> None:
    g = torch.Generator().manual_seed(1)
    up, down = torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)
    order = row_order(swap_halves, 6)
    assert order is not None
    lora = make_lora("layer", up, down, 3.0).reordered(order)
    torch.testing.assert_close(lora.up @ lora.down, swap_halves(up @ down))
    assert (lora.scale, lora.rank) == (1.5, 2)
    (dense,) = read_adapters({f"a.{key}": up}).values()
    assert torch.equal(dense.reordered(order).tensors()[0], swap_halves(up))
    assert dense.reordered(order).kind == dense.kind
