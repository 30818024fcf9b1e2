"""What takes long, in the WebUI's progress bar and in the log; and whether the user has interrupted it.

The bar shows `shared.state.textinfo` beside its percentage. A stage has it for as long as it lasts, and puts
back what stood there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lib_precision_lora.plain_text import plain
from lib_precision_lora.ticks import Tick, untold

logger = logging.getLogger("lib_precision_lora")

ANNOUNCED_AFTER = 1.0
"""Seconds after which the log speaks of a stage, too."""

REPEATED_AFTER = 10.0
"""Seconds from one line of the log to the next."""

Stage = Callable[[str], AbstractContextManager[Tick]]
"""Begins a stage under this name."""


class Interrupted(Exception):
    """The user wants no more of it: what was being done is given up, and the next generation does it anew."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"interrupted: {stage}")


@contextmanager
def unshown(name: str) -> Iterator[Tick]:
    """A stage that nobody sees, and nobody interrupts."""
    yield untold


class NoJob:
    """The state of a stage that is part of no job: it is shown in the log alone. A job that may run meanwhile
    has its bar for itself, and what is pressed for it."""

    textinfo: str | None = None
    job_count = 0
    interrupted = skipped = False


class Progress:
    """Stages of what the WebUI is waiting for.

    state: asked for the WebUI's `shared.state`; clock: seconds that never go back.
    """

    def __init__(self, state: Callable[[], Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._state, self.clock = state, clock

    @property
    def interrupted(self) -> bool:
        """Whether the user has pressed Interrupt while a job runs.

        The flag alone would not do: the WebUI leaves it as it is when a job of its API ends, and takes it
        back when the next one begins. Between jobs `job_count` is 0.
        """
        state = self._state()
        return bool(state.job_count != 0 and state.interrupted)

    @property
    def unwanted(self) -> bool:
        """Whether the image at hand will not be sampled: the WebUI ends it before its next step, and all
        others with it (Interrupt) or not (Skip, which it takes back where a batch begins)."""
        state = self._state()
        return self.interrupted or bool(state.job_count != 0 and state.skipped)

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """`with stage("reading a file") as tick: tick(done, total)`, as often as there is something new.

        The bar shows the name, and the percentage that is done. The log has a line once this has lasted a
        second, one more every ten seconds, and one at the end. `tick` raises `Interrupted` where the image
        is not wanted any more.
        """
        name, state = plain(name), self._state()
        before, started = state.textinfo, self.clock()
        announced, given_up, due = False, False, started + ANNOUNCED_AFTER

        def tick(done: int, total: int) -> None:
            nonlocal announced, given_up, due
            if self.unwanted:
                given_up = True
                raise Interrupted(name)
            state.textinfo = f"{name} {100 * done // total} %" if total else name
            now = self.clock()
            if now >= due:
                announced, due = True, now + REPEATED_AFTER
                logger.info("%s", state.textinfo)

        state.textinfo = name
        try:
            yield tick
        finally:
            state.textinfo = before
            if announced or given_up:
                end = "interrupted after" if given_up else "took"
                logger.info("%s: %s %.1f s", name, end, self.clock() - started)

    @contextmanager
    def whole(self, name: str, logged: bool = True) -> Iterator[None]:
        """What is the WebUI's own, and can neither be followed nor interrupted.

        logged: whether the log has a line at once; one at the end it has where this has lasted a second.
        """
        name, state = plain(name), self._state()
        before, started = state.textinfo, self.clock()
        if logged:
            logger.info("%s", name)
        state.textinfo = name
        try:
            yield
        finally:
            state.textinfo = before
            seconds = self.clock() - started
            if seconds >= ANNOUNCED_AFTER:
                logger.info("%s: took %.1f s", name, seconds)
