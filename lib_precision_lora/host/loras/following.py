"""Brings models to the LoRAs that they are to have, and says what was left out."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lib_precision_lora.branch import PatchError
from lib_precision_lora.branch.session.undo import run_all
from lib_precision_lora.host.generation.notices import Notices
from lib_precision_lora.host.generation.progress import Progress
from lib_precision_lora.host.generation.record import Record
from lib_precision_lora.host.interface import Merge
from lib_precision_lora.host.loras.attempts import Attempts
from lib_precision_lora.host.loras.division import HostPatches, only, source_of, strengths_of
from lib_precision_lora.host.loras.hosted import AttachInterrupted, HostedSession, StillMerged
from lib_precision_lora.host.page.settings import Arithmetic, Settings

logger = logging.getLogger("lib_precision_lora")

Sources = frozenset[str]


class Following:
    """sessions: by model, where something was attached; checkpoint: the models of the one that is loaded;
    incomplete: how often conditioning was computed while a text encoder lacked something.

    elsewhere: given a model and the checkpoint's models, the sources that have failed in another of them;
    no_room: those that do not fit on the card; new_session: makes that of a model; watch: told of each
    new one.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        checkpoint: Callable[[], Sequence[nn.Module]],
        progress: Progress,
        record: Record,
        notices: Notices,
        new_session: Callable[[nn.Module], HostedSession],
    ) -> None:
        self.sessions: weakref.WeakKeyDictionary[nn.Module, HostedSession] = weakref.WeakKeyDictionary()
        self.incomplete = 0
        self.attempts = Attempts(self._tell)
        self.elsewhere: Callable[[nn.Module, Sequence[nn.Module]], Sources] = lambda model, models: (
            frozenset()
        )
        self.no_room: Callable[[nn.Module], Sources] = lambda model: frozenset()
        self.watch: Callable[[nn.Module, HostedSession], None] = lambda model, session: None
        self._new_session = new_session
        self._settings, self._checkpoint = settings, checkpoint
        self._progress, self._record, self._notices = progress, record, notices

    def session(self, model: nn.Module) -> HostedSession:
        """That of a model, made where missing."""
        if model not in self.sessions:
            self.sessions[model] = self._new_session(model)
            self.watch(model, self.sessions[model])
        return self.sessions[model]

    def bring(self, model: nn.Module, patches: HostPatches, merge: Merge) -> None:
        """Bring a model to these patches; what was left out is told. Raises nothing but an interrupt: out of
        here, an error would leave the host's list of loaded models wrong."""
        try:
            problems = self._follow(model, patches, self._settings().arithmetic, merge)
        except Exception as error:
            logger.exception("following the WebUI's LoRAs failed")
            reason = f"attaching failed ({type(error).__name__}: {error})"
            problems = [PatchError(f"all of them: {reason}; please report it with the console's log")]
            self._without_loras(model, merge)
        if problems and not hasattr(model, "diffusion_model"):
            self.incomplete += 1
        self.attempts.made(model, problems)

    def stand_back_from(self, model: nn.Module) -> bool:
        """Take everything of ours off this model; whether there was something."""
        session = self.sessions.get(model)
        if session is None:
            return False
        session.clear()
        del self.sessions[model]
        return True

    def left_out(self, source: str | None, message: str, failed: bool = True) -> None:
        """Tell page, log and report; source: the file as the host's patchers know it, None: all; failed:
        False where the user wanted it so."""
        self._record.present.problem(source, message)
        self._notices.problem(source or "all", message, failed)

    def _follow(
        self, model: nn.Module, patches: HostPatches, arithmetic: Arithmetic, merge: Merge
    ) -> Sequence[PatchError]:
        """Bring a model to these patches, but for files that have no room, or have failed in another model
        of the checkpoint; the reason for each that fails here."""
        session = self.session(model)
        left_out = self.no_room(model)
        if left_out and not hasattr(model, "diffusion_model"):
            self.incomplete += 1
        models = self._checkpoint()
        ours = any(each is model for each in models)
        if ours:
            left_out |= self.elsewhere(model, models)
        fitting = {source_of(key) for key in patches} - left_out
        started = time.perf_counter()
        fit = only(patches, fitting)
        with self._progress.stage("attaching LoRAs") as tick:
            problems = session.follow(model, fit, arithmetic, merge, tick)
        if ours:
            self._followed(model, fit, problems, time.perf_counter() - started)
        return problems

    def _followed(
        self, model: nn.Module, patches: Any, problems: Sequence[PatchError], seconds: float
    ) -> None:
        """Into the report: what stands on one of the checkpoint's models now."""
        left_out = {problem.source for problem in problems if not isinstance(problem, StillMerged)}
        self._record.present.followed(
            type(model).__name__,
            not hasattr(model, "diffusion_model"),
            seconds,
            self.session(model).host_layers,
            strengths_of(patches, left_out),
        )

    def _tell(self, model: nn.Module, problems: Sequence[PatchError]) -> None:
        """What was left out of a model that is loaded."""
        for problem in problems:
            if isinstance(problem, StillMerged):
                self._notices.problem("what the WebUI has merged", f"A former LoRA is active: {problem}")
            else:
                failed = not isinstance(problem, AttachInterrupted)
                said = f"A LoRA was left out: {problem}{self._acted_already(model, problem.source)}"
                self.left_out(problem.source, said, failed)

    def _acted_already(self, model: nn.Module, source: str | None) -> str:
        """What is to be added where the diffusion model lacks a file, and the text encoders had it."""
        if not hasattr(model, "diffusion_model"):
            return ""
        others = [self.sessions.get(each) for each in self._checkpoint()]
        there = any(source in each.sources for each in others if each not in (None, self.sessions.get(model)))
        return "; its part for the text encoders has acted on the prompt" if there else ""

    def _without_loras(self, model: nn.Module, merge: Merge) -> None:
        """Leave a model without any LoRA, as far as that can be done."""
        session = self.sessions.get(model)
        take_out = partial(merge, {})
        try:
            run_all([take_out] if session is None else [session.clear, take_out])
        except Exception:
            logger.exception("taking LoRAs off failed, too; load the checkpoint anew")


def known(sessions: Mapping[nn.Module, HostedSession], model: Any) -> HostedSession | None:
    """The session of what the host loads or unloads, which may be no model at all."""
    return sessions.get(model) if isinstance(model, nn.Module) else None
