"""A stand-in for `memory.budget` where the library has none: arithmetic enough to tell placements apart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

NAME = "lib_precision_lora.memory.budget"


@dataclass(frozen=True)
class Plan:
    placement: str
    peak_bytes: int
    reserve_bytes: int
    resident_bytes: int
    streamed_bytes: int
    offloaded_bytes: int
    advice: tuple[str, ...]


def plan_budget(
    *,
    base_bytes: int,
    factor_bytes: int | Sequence[int],
    workspace_bytes: int,
    inference_bytes: int,
    margin_bytes: int,
    free_bytes: int,
    total_bytes: int,
) -> Plan:
    factors = factor_bytes if isinstance(factor_bytes, int) else sum(factor_bytes)
    room = min(free_bytes, total_bytes) - inference_bytes - margin_bytes - workspace_bytes
    placement = "resident" if factors <= room else "streamed" if room >= 0 else "refused"
    resident = factors if placement == "resident" else max(0, room)
    peak = resident + workspace_bytes
    offloaded = max(0, base_bytes - room + resident)
    advice = () if placement == "resident" and not offloaded else ("use a smaller checkpoint",)
    return Plan(placement, peak, peak, resident, factors - resident, offloaded, advice)


def install_if_missing() -> None:
    if NAME not in sys.modules and find_spec(NAME) is None:
        module = ModuleType(NAME)
        module.Plan, module.plan_budget = Plan, plan_budget  # type: ignore[attr-defined]
        sys.modules[NAME] = module
