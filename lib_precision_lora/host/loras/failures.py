"""What fails once LoRAs are attached: while factors are placed, or in a forward. The image goes on.

placing     the file that is to blame is found, left out of its model, and the rest is placed
a forward   the same, from the layer on at which it came up; that layer goes on without the file
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lib_precision_lora.branch import PatchError
from lib_precision_lora.branch.session.rescue import Trial
from lib_precision_lora.host.interface import Host
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.reservation.memory import MemoryPlanner

logger = logging.getLogger("lib_precision_lora")


class ForwardFailures:
    """sessions: those that there are, by model; host: the WebUI; memory: what places
    factors; tell: given a source (None: all) and a sentence; stop: raises where the user wants no image
    without a LoRA."""

    def __init__(
        self,
        sessions: Mapping[nn.Module, HostedSession],
        host: Host,
        memory: MemoryPlanner,
        tell: Callable[[str | None, str], None],
        stop: Callable[[], None],
    ) -> None:
        self._sessions, self._host = sessions, host
        self._memory, self._tell, self._stop = memory, tell, stop

    def watch(self, model: nn.Module, session: HostedSession) -> None:
        """From now on a forward of this model goes on where a branch fails."""
        session.rescue.listener = partial(self._in_forward, weakref.ref(model))

    def elsewhere(self, model: nn.Module, others: Sequence[nn.Module]) -> frozenset[str]:
        """The sources that have failed in one of the other models of the same checkpoint."""
        sessions = [self._sessions.get(other) for other in others if other is not model]
        return frozenset(source for each in sessions if each is not None for source in each.failed)

    def _in_forward(
        self, model_ref: weakref.ref[nn.Module], name: str, error: Exception, trial: Trial | None
    ) -> None:
        model = model_ref()
        session = None if model is None else self._sessions.get(model)
        if model is None or session is None:
            return
        reason = f"it failed while the model was running ({type(error).__name__}: {error})"
        sentence = f"layer {name}: {reason}; what was computed before that has it"
        try:
            patcher = next(each.model for each in self._host.loaded() if each.model.model is model)
            if session.leave_out(
                PatchError(sentence, None, name), trial and self._after_placing(patcher, trial)
            ):
                self._host.follow(patcher)
                self._memory.place(patcher)
        except Exception:
            logger.exception("leaving out a LoRA that had failed failed, too")
            session.clear()
            self._tell(
                None, f"A LoRA was left out: all of them: {sentence}; please report it with the console's log"
            )
        self._stop()

    def _after_placing(self, patcher: Any, trial: Trial) -> Trial:
        def placed() -> None:
            self._memory.bring(patcher)
            trial()

        return placed
