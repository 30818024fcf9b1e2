"""The memory of additions is planned once for all strengths, and is that of each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib_precision_lora.adapters import Target, make_lora, to_forge_patch
from lib_precision_lora.branch import Patch, PatchError, PatchSession
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.loras.planned_strengths import PLANNED_STRENGTH
from lib_precision_lora.host.page.settings import Arithmetic
from tests.host.loras.test_hosted import entry, ours, small_model

CPU = torch.device("cpu")
KINDS = ("lora", "loha", "loha-streamed", "lokr-both")
VALUES = {kind: ours(kind, (16, 8)) for kind in (*KINDS, "dora-out", "oft")}


def patches(strength: float, kinds: tuple[str, ...] = KINDS) -> dict[Any, Any]:
    """One file for each kind; the host has its strength in the identifier, too."""
    return {(kind, strength, 1.0): {"linear.weight": [entry(VALUES[kind], strength)]} for kind in kinds}


@pytest.fixture
def sketches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each sketch."""
    made: list[int] = []
    sketch = PatchSession.footprints

    def counted(*given: Any) -> Any:
        made.append(len(given[1]))
        return sketch(*given)

    monkeypatch.setattr(PatchSession, "footprints", counted)
    return made


def test_one_plan_is_that_of_every_strength_of_additions(sketches: list[int]) -> None:
    model = small_model()
    session = HostedSession(model)
    for strength in (1.0, 0.3, -2.0, 1e-20, PLANNED_STRENGTH):
        found = session.footprints(model, patches(strength), Arithmetic(), CPU, torch.float32)
        exact = PatchSession(model).footprints(
            [Patch(kind, Target("linear.weight"), VALUES[kind].adapter, strength) for kind in KINDS],
            Arithmetic().compute,
            CPU,
            torch.float32,
        )
        assert found == exact
    assert len(sketches) == 1 + 5  # that of the session, and each exact one


@pytest.mark.parametrize("other", [0.0, 2 * PLANNED_STRENGTH])
def test_a_strength_that_makes_nothing_or_is_a_very_large_one_is_planned_by_itself(
    sketches: list[int], other: float
) -> None:
    model = small_model()
    session = HostedSession(model)
    for strength in (1.0, other, other, 1.0):
        session.footprints(model, patches(strength), Arithmetic(), CPU, torch.float32)
    assert len(sketches) == 3


@pytest.mark.parametrize("kind", ["dora-out", "oft"])
def test_what_does_not_only_add_is_planned_at_its_own_strength(sketches: list[int], kind: str) -> None:
    model = small_model()
    session = HostedSession(model)
    for strength in (1.0, 0.5, 0.5):
        session.footprints(model, patches(strength, ("lora", kind)), Arithmetic(), CPU, torch.float32)
    assert len(sketches) == 2


def test_a_strength_that_no_plan_takes_is_refused_after_one_that_it_takes() -> None:
    model = small_model()
    session = HostedSession(model)
    large = make_lora("layer", torch.ones(16, 1), torch.ones(1, 8), alpha=1e38)
    values = {"small": VALUES["lora"], "large": to_forge_patch(large)}
    for name, strength, refused in (
        ("small", 1.0, False),
        ("small", 1e39, True),
        ("large", 1.0, False),  # beside an alpha with which the planned strength would be refused
        ("large", 2.0, False),
        ("large", 10.0, True),
        ("large", 1.0, False),
    ):
        wanted = {("file", strength): {"linear.weight": [entry(values[name], strength)]}}
        if refused:
            with pytest.raises(PatchError, match=r"layer linear\.weight: .*strength"):
                session.footprints(model, wanted, Arithmetic(), CPU, torch.float32)
        else:
            assert session.footprints(model, wanted, Arithmetic(), CPU, torch.float32)
