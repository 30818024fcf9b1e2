"""Finite numbers that fp32 cannot hold are found while a set is attached, not in a forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lib_precision_lora.adapters import AdapterError, LoRA, make_lora, read_adapters
from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch import PatchError, PatchSession
from lib_precision_lora.branch.arithmetic.factors import balanced_factors
from lib_precision_lora.branch.arithmetic.stack import balanced_addition, turned_factors
from tests.branch.hosts import Holder
from tests.families import FAMILIES, family

OUT, IN = 32, 48
LARGEST = 3.4028234663852886e38
"""2^127 · (2 − 2^−23): fp32's largest number, by its definition."""

BEYOND = [1e39, -1e39, 1e300, -1e300, math.inf, -math.inf, math.nan, LARGEST * 1.0000001]


def a_layer() -> Holder:
    return Holder(torch.nn.Linear(IN, OUT))


def tensors(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(OUT, 4, generator=generator), torch.randn(4, IN, generator=generator)
    return {"layer.lora_up.weight": up.to(dtype) * scale, "layer.lora_down.weight": down.to(dtype)}


def require_refused(model: Holder, adapters: Any, strength: float, match: str) -> None:
    """This error, and a model as it was."""
    x = torch.ones(2, IN)
    before = model(x)
    with PatchSession(model) as session:
        with pytest.raises(PatchError, match=match):
            session.apply([("file", adapters, strength)])
        assert session.attached == ()
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("strength", BEYOND)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_strength_beyond_fp32_is_refused_whatever_the_family(name: str, strength: float) -> None:
    made = family(name, (OUT, IN), 0)
    require_refused(a_layer(), {"layer": made.adapter}, strength, "strength")


@pytest.mark.parametrize(
    ("alpha", "strength"), [(1e300, 1.0), (1e300, 0.5), (3e38, 20.0), (-3e38, 20.0), (1.5e39, 1.0)]
)
def test_an_alpha_beyond_fp32_is_refused_where_it_is_attached(alpha: float, strength: float) -> None:
    file = read_adapters({**tensors(), "layer.alpha": torch.tensor(alpha, dtype=torch.float64)}, None)
    require_refused(a_layer(), file, strength, r"file: layer layer\.weight: ")


@pytest.mark.parametrize("shape", [(OUT, 1), (1, IN)], ids=["outputs", "inputs"])
@pytest.mark.parametrize("alpha", [1e160, 1e300])
def test_an_alpha_beyond_fp32_is_refused_beside_a_magnitude_whose_norm_it_is_in(
    shape: tuple[int, int], alpha: float
) -> None:
    scale = {"layer.alpha": torch.tensor(alpha, dtype=torch.float64), "layer.dora_scale": torch.ones(shape)}
    file = read_adapters({**tensors(), **scale}, None)
    require_refused(a_layer(), file, 1.0, r"file: layer layer\.weight: ")


@pytest.mark.parametrize("role", ["lora_up", "lora_down"])
def test_a_factor_in_fp64_that_fp32_does_not_hold_is_refused(role: str) -> None:
    damaged = tensors(dtype=torch.float64)
    damaged[f"layer.{role}.weight"][1, 2] = 1e300
    with pytest.raises(AdapterError, match=rf"{role} holds 1 values beyond 3.4e\+38 of"):
        read_adapters(damaged, None)


def test_a_product_of_factors_that_fp32_does_not_hold_is_refused() -> None:
    lora = make_lora("layer", torch.full((OUT, 1), 1e25), torch.full((1, IN), 1e25))
    require_refused(a_layer(), {"layer": lora}, 1.0, "reaches 1e")


def test_a_magnitude_that_leaves_fp32_beside_its_norm_is_refused() -> None:
    layer = torch.nn.Linear(IN, OUT)
    torch.nn.init.constant_(layer.weight, 1e-6)
    dora = {
        "layer.lora_up.weight": torch.full((OUT, 1), 1e-9),
        "layer.lora_down.weight": torch.full((1, IN), 1e-9),
        "layer.dora_scale": torch.full((OUT, 1), 3e38),
    }
    require_refused(Holder(layer), read_adapters(dora, None), 1.0, "fp32 does not hold")


@pytest.mark.parametrize("compute", ["auto", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("alpha", "factor", "strength"), [(3e38, 1e-38, 1.0), (4.0, 1e-30, 1e30), (4.0, 1e-38, LARGEST * 1e-7)]
)
def test_large_numbers_that_fit_are_applied_exactly(
    alpha: float, factor: float, strength: float, compute: str
) -> None:
    """The near miss: large numbers whose product with the factors is an ordinary one."""
    raw = {**tensors(factor, torch.float64), "layer.alpha": torch.tensor(alpha, dtype=torch.float64)}
    stored = {key: value.float() for key, value in raw.items()}
    delta = stored["layer.lora_up.weight"].double() @ stored["layer.lora_down.weight"].double()
    delta *= strength * alpha / 4
    model, x = a_layer(), torch.randn(3, IN, generator=torch.Generator().manual_seed(2))
    exact = model(x).double() + x.double() @ delta.T
    with PatchSession(model) as session:
        session.apply([("file", read_adapters(stored, None), strength)], compute)  # type: ignore[arg-type]
        y = model(x)
    assert torch.isfinite(y).all()
    assert float((y.double() - exact).norm()) <= 2e-3 * float(exact.norm())


def test_factors_are_looked_at_once_from_file_to_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    whole = torch.Tensor.aminmax

    def counted(self: torch.Tensor, **given: Any) -> Any:
        looked_at.append(self.numel())
        return whole(self, **given)

    monkeypatch.setattr(torch.Tensor, "aminmax", counted)
    file = read_adapters(tensors(dtype=torch.bfloat16), None)
    assert looked_at == [OUT * 4, 4 * IN]
    model = a_layer()
    with PatchSession(model) as session:
        session.apply([("file", file, 1.0)])
        model(torch.ones(2, IN))
        session.apply([("file", file, 0.5), ("again", file, 0.5)])
        model(torch.ones(2, IN))
    assert looked_at == [OUT * 4, 4 * IN]


@pytest.mark.parametrize("rows", [None, (0, 16), (8, 16)])
def test_a_part_of_large_factors_is_balanced_by_its_own_numbers(rows: tuple[int, int] | None) -> None:
    """One row of 2^60 is not where the part is; what is known of the whole says nothing of it."""
    raw = tensors()
    raw["layer.lora_up.weight"][31] = 2.0**60
    lora = read_adapters(raw, None)["layer"]
    assert isinstance(lora, LoRA)
    step = Add(0, OUT, lora.term, 1.0) if rows is None else Add(*_range(rows), lora.term, 1.0, rows[0])
    made, (up, down) = balanced_addition(step), turned_factors(step)
    found = balanced_factors(up, down)
    assert (made.exponent, made.up.dtype) == (found.exponent, found.up.dtype)
    assert made.exponent == (61 if rows is None else 0)
    assert torch.equal(made.up, found.up)
    assert torch.equal(made.down, found.down)


def _range(rows: tuple[int, int]) -> tuple[int, int]:
    return rows[0], sum(rows)
