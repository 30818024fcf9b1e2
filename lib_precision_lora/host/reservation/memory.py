"""The memory of a patch set: planned before the host places models, told to it, and kept.

The host makes room with the number that it is told, and places base layers around it. A model that stands
on the card already it would leave as it is; where that leaves too little, it is unloaded first.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lib_precision_lora.branch import PatchError, PatchMemoryError
from lib_precision_lora.host.generation.progress import Interrupted, Stage
from lib_precision_lora.host.interface import Host, LoadRequest
from lib_precision_lora.host.loras.division import source_of
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.reservation.budgeting import Budgeting, activation_type
from lib_precision_lora.host.reservation.planning import UNPLANNED, ModelPlan, Planning
from lib_precision_lora.memory import Plan
from lib_precision_lora.memory.budget import megabytes
from lib_precision_lora.ticks import Tick, untold

logger = logging.getLogger("lib_precision_lora")

WORTH_A_MOVE = 256 * 2**20
"""How much less a patch set has to ask for, before a model that lies in RAM in part is placed anew."""

A_LITTLE_MORE = 1.02
"""How much more a patch set may ask for than before, since free memory is never quite the same."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Bytes of one model's factors, when they were placed: on the card, and in RAM to be streamed."""

    standing: int = 0
    streamed: int = 0


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """factor_bytes: LoRA factors on the card, as planned; measured_bytes: those that stood there when placed;
    streamed_bytes: those that then waited in RAM; extra_bytes: the card's largest use beyond the same
    generation without LoRAs, as planned, with one model at work at a time."""

    factor_bytes: int
    measured_bytes: int
    streamed_bytes: int
    extra_bytes: int


class MemoryPlanner:
    """Plans the memory of every model with LoRAs, at each call of the host's `load_models_gpu`.

    host: the WebUI; session: the one of a model, made where missing; tell: given a
    source that is left out, and why; stage: where placing is shown.
    """

    def __init__(
        self,
        host: Host,
        budgeting: Budgeting,
        planning: Planning,
        session: Callable[[nn.Module], HostedSession],
        tell: Callable[[str, str], None],
        stage: Stage,
    ) -> None:
        self._host = host
        self._budgeting, self._planning = budgeting, planning
        self._session = session
        self._tell = tell
        self._plans: weakref.WeakKeyDictionary[nn.Module, ModelPlan] = weakref.WeakKeyDictionary()
        self._granted: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._stage = stage
        self._granted_for: weakref.WeakKeyDictionary[nn.Module, frozenset[str]] = weakref.WeakKeyDictionary()
        self._measured: weakref.WeakKeyDictionary[nn.Module, Placed] = weakref.WeakKeyDictionary()
        self._seconds = 0.0

    def left_out(self, model: nn.Module) -> frozenset[str]:
        """The sources that do not fit on the card."""
        plan = self._plans.get(model)
        return frozenset() if plan is None else plan.left_out

    def forget(self, model: nn.Module) -> None:
        for kept in (self._plans, self._granted, self._granted_for, self._measured):
            kept.pop(model, None)

    def prepare(self, patchers: Sequence[Any], request: LoadRequest) -> int:
        """Plan these patchers, among everything that is to be loaded with them; bytes to ask the host for."""
        if not patchers:
            return 0
        start = time.perf_counter()
        reserve = 0
        try:
            for patcher in patchers:
                decided, refused = self._planning.plan(patcher, request)
                self._plans[patcher.model] = decided
                for source, plan in refused.items():
                    self._refuse(source, plan)
            reserve = sum(self._reserve(patcher) for patcher in patchers)
            room = self._host.beside(request.required) + request.kept + reserve
            for patcher in patchers:
                self._make_room(patcher, request.models, room)
            reserve = sum(self._reserve(patcher) for patcher in patchers)
        except Exception:  # an unplanned LoRA is better than no image
            logger.exception("planning the memory of LoRAs failed; please report it with the console's log")
            for patcher in patchers:
                self._plans[patcher.model] = UNPLANNED
        self._seconds = time.perf_counter() - start
        return reserve

    def bring(self, patcher: Any, tick: Tick = untold) -> None:
        """Bring the factors to where the plan wants them; streamed where there is no room after all.

        Raises `PatchError` as `PatchSession.place` does.
        """
        session, decided = self._session(patcher.model), self._plans.get(patcher.model)
        if decided is None or not session.attached:
            return
        device, dtype = patcher.load_device, activation_type(patcher.model)
        try:
            session.place(device, dtype, decided.resident, tick)
        except PatchMemoryError as error:
            logger.warning("%s; trying once more with factors streamed from RAM", error)
            session.place(device, dtype, frozenset(), tick)

    def place(self, patcher: Any) -> None:
        """Bring the factors to the device; a file for which that fails is left out."""
        model, start = patcher.model, time.perf_counter()
        decided, session = self._plans.get(model), None
        if decided is None:
            return
        try:
            session = self._session(model)
            while session.attached:
                try:
                    with self._stage("placing LoRAs") as tick:
                        self.bring(patcher, tick)
                except PatchError as error:
                    if session.leave_out(error, partial(self.bring, patcher)):
                        self._host.follow(patcher)
                        continue
                self._seconds += time.perf_counter() - start
                self._log(patcher, decided)
                return
        except Interrupted:
            pass  # the first forward places the rest, if there is one
        except Exception:  # the first forward places them as well
            logger.exception("placing LoRAs failed; please report it with the console's log")
        finally:
            if session is not None:
                self._measured[model] = Placed(session.placed_bytes, session.streamed_bytes)

    def guard(self, host_free_memory: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `free_memory`, never asked for more than the card has."""

        def free_memory(memory_required: float, device: Any, *args: Any, **kwargs: Any) -> Any:
            return host_free_memory(self.at_most_the_card(memory_required, device), device, *args, **kwargs)

        return free_memory

    def at_most_the_card(self, size: float, device: Any) -> float:
        """The request, or the card's size where it is larger, or no number at all."""
        return self._budgeting.at_most_the_card(size, device)

    def beside_the_least(self, kept: float, device: Any) -> float:
        """At most what the card has beside the least that the host keeps free for every generation."""
        room = self._host.memory.get_total_memory(device) - self._host.memory.minimum_inference_memory()
        return min(kept, max(0.0, float(room)))

    def report(self, models: Sequence[nn.Module]) -> MemoryReport | None:
        """Planned and measured bytes of these models together; None where nothing is attached.

        It may be asked for by another thread than the one that plans.
        """
        decided = [(model, self._plans.get(model)) for model in models]
        plans = [(model, each.plan) for model, each in decided if each is not None]
        plans = [(model, plan) for model, plan in plans if self._budgeting.attached(model)]
        if not plans:
            return None
        placed = [self._measured.get(model, Placed()) for model, _ in plans]
        resident = sum(plan.resident_bytes for _, plan in plans)
        return MemoryReport(
            resident,
            sum(each.standing for each in placed),
            sum(each.streamed for each in placed),
            resident + max(plan.peak_bytes - plan.resident_bytes for _, plan in plans),
        )

    def _reserve(self, patcher: Any) -> int:
        """What is to be kept free for this model beyond what its factors hold already."""
        plan = self._plans[patcher.model].plan
        return max(0, plan.reserve_bytes - self._budgeting.placed(patcher.model))

    def _make_room(self, patcher: Any, models: Sequence[Any], needed: float) -> None:
        """Unload a model that stands on the card where the host would leave too little beside it."""
        host, device, model = self._host.memory, patcher.load_device, patcher.model
        here = [loaded for loaded in self._host.loaded() if loaded.model.model is model]
        granted, wanted = self._granted.get(model, 0), self._plans[model].plan.reserve_bytes
        files = frozenset(source_of(key) for key in self._host.patches(patcher))
        same_files = self._granted_for.get(model) == files
        self._granted_for[model] = files
        if not here or self._host.gives_way or host.is_device_cpu(device):
            self._granted[model] = wanted
            return
        if wanted > granted * A_LITTLE_MORE:
            self._granted[model] = wanted
            keep = [each for each in self._host.loaded() if any(each.model is m for m in models)]
            host.free_memory(needed, device, [*keep, *here])
            if host.get_free_memory(device) >= needed:
                return
        elif (
            same_files or granted - wanted < WORTH_A_MOVE or not any(each.model_accelerated for each in here)
        ):
            return
        self._granted[model] = wanted
        logger.info("the model is placed anew, with %d MB kept free for LoRAs", megabytes(wanted))
        for loaded in here:
            host.current_loaded_models.remove(loaded)
            loaded.model_unload()
        host.soft_empty_cache()

    def _refuse(self, source: str, plan: Plan) -> None:
        self._tell(
            source,
            f"A LoRA was left out: {source} does not fit on the card beside those before it: "
            f"{megabytes(plan.peak_bytes)} MB are needed even when it is streamed from RAM. What helps: "
            f"{'; '.join(plan.advice)}",
        )

    def _log(self, patcher: Any, decided: ModelPlan) -> None:
        plan, session = decided.plan, self._session(patcher.model)
        logger.info(
            "LoRAs on %s: %d MB planned (%d MB of factors on the card, %d MB streamed from RAM, %d MB "
            "workspace); %d MB of factors stand on the card; %d MB of merged originals in RAM; %.1f s",
            type(getattr(patcher.model, "diffusion_model", patcher.model)).__name__,
            megabytes(plan.peak_bytes),
            megabytes(plan.resident_bytes),
            megabytes(plan.streamed_bytes),
            megabytes(plan.peak_bytes - plan.resident_bytes),
            megabytes(session.placed_bytes),
            megabytes(decided.originals_bytes),
            self._seconds,
        )
