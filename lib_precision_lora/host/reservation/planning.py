"""Which of a model's files fit on the card, and where their factors lie: decided, and told to nobody."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_precision_lora.host.interface import LoadRequest
from lib_precision_lora.host.loras.division import source_of
from lib_precision_lora.host.reservation.budgeting import Budgeting, Patches, without
from lib_precision_lora.memory import Plan
from lib_precision_lora.memory.allocator import allocated_bytes
from lib_precision_lora.memory.placement import choose_resident

logger = logging.getLogger("lib_precision_lora")


@dataclass(frozen=True, slots=True, eq=False)
class ModelPlan:
    """What was decided for one model: the plan, which modules' factors stay on the card (None: all), the
    sources that are left out, and the bytes of merged layers' originals, which wait in RAM."""

    plan: Plan
    resident: frozenset[str] | None
    left_out: frozenset[str]
    originals_bytes: int = 0


UNPLANNED = ModelPlan(Plan("resident", 0, 0, 0, 0, 0), None, frozenset())
"""Everything is tried, and nothing is asked of the host."""


class Planning:
    """checkpoint: the patchers of the one that is loaded."""

    def __init__(self, budgeting: Budgeting, checkpoint: Callable[[], Sequence[Any]] = tuple) -> None:
        self._budgeting, self._checkpoint = budgeting, checkpoint

    def plan(
        self,
        patcher: Any,
        request: LoadRequest,
    ) -> tuple[ModelPlan, dict[str, Plan]]:
        """The plan with every file, or with each that fits beside those before it, and of each other one the
        plan that was refused."""
        every = self._budgeting.patches(patcher)
        sources = {source_of(key) for key in every}
        together = any(each.model is patcher.model for each in self._checkpoint())
        elsewhere = self.refused() if together else {}
        patches = without(every, set(elsewhere))
        decided, refused = self._choose(patcher, patches, request)
        refused = {source: plan for source, plan in {**refused, **elsewhere}.items() if source in sources}
        return dataclasses.replace(decided, left_out=frozenset(refused)), refused

    def refused(self) -> Mapping[str, Plan]:
        """The files of the present prompt that do not fit on the card with one of the checkpoint's models,
        however small the image; such a file is left out of all of them."""
        found: dict[str, Plan] = {}
        try:
            for patcher in self._checkpoint():
                found |= self._choose(patcher, self._budgeting.patches(patcher), _smallest(patcher))[1]
        except Exception:
            logger.exception("planning the memory of LoRAs failed; please report it with the console's log")
        return found

    def foresee(
        self, patchers: Sequence[Any], required: Sequence[float], positions: int | None
    ) -> list[tuple[ModelPlan, dict[str, Plan]]]:
        """What the plan of each of a checkpoint's patchers would be, and of each file that has no room in it
        the plan that was refused; in the order of the patchers.

        required: the host's own `memory_required` for each. Raises `PatchError` as attaching does.
        """
        for patcher in patchers:
            self._budgeting.sketch(patcher, self._budgeting.patches(patcher))
        alone = [self._choose(each, self._budgeting.patches(each), _smallest(each))[1] for each in patchers]
        elsewhere = {source for refused in alone for source in refused}
        foreseen = []
        for patcher, own, size in zip(patchers, alone, required, strict=True):
            every, request = self._budgeting.patches(patcher), LoadRequest([patcher], size, 0, positions)
            if own:  # refused for the smallest image already: told by the numbers of this one
                own |= self._choose(patcher, every, request)[1]
            patches = without(every, elsewhere)
            decided, refused = self._choose(patcher, patches, request)
            left_out = frozenset({source_of(key) for key in every} & {*elsewhere, *refused})
            foreseen.append((ModelPlan(decided.plan, decided.resident, left_out), own | refused))
        return foreseen

    def _choose(
        self,
        patcher: Any,
        patches: Patches,
        request: LoadRequest,
    ) -> tuple[ModelPlan, dict[str, Plan]]:
        """The plan with as many of these files as fit, and of each other one the plan that was refused."""

        def decide(patches: Patches) -> ModelPlan:
            footprints = self._budgeting.footprints(patcher, patches)
            plan = self._budgeting.budget(patcher, footprints, request)
            resident = None
            if plan.placement == "streamed":
                sizes = {name: allocated_bytes(each.factors) for name, each in footprints.items()}
                resident = choose_resident(sizes, plan.resident_bytes)
            originals = sum(each.host_bytes for each in footprints.values())
            return ModelPlan(plan, resident, frozenset(), originals)

        every = decide(patches)
        if every.plan.placement != "refused":
            return every, {}
        sources = dict.fromkeys(source_of(key) for key in patches)
        left_out, refused, decided = set(sources), {}, decide({})
        for source in sources:
            trial = decide(without(patches, left_out - {source}))
            if trial.plan.placement == "refused":
                refused[source] = trial.plan
            else:
                left_out.remove(source)
                decided = trial
        return decided, refused


def _smallest(patcher: Any) -> LoadRequest:
    """This model alone, with an image of one position."""
    return LoadRequest([patcher], positions=1)
