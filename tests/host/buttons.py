"""A user who presses a button while something lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lib_precision_lora.host import installation
from tests.host.webui import Host

INTERRUPT, SKIP = "interrupted", "skipped"


class User:
    """Stands where the stages' clock is, which they look at once for each tick.

    seen: what stood in the WebUI's bar each time; button: the flag that is raised; at: the number of the
    look, counted from 0, at which it is, or what the bar says when it is.
    """

    def __init__(self, state: Any, button: str, at: int | str | None) -> None:
        self.state, self.button, self.at = state, button, at
        self.seen: list[str] = []
        self.pressed = False

    def __call__(self) -> float:
        now = str(self.state.textinfo)
        if self.at == len(self.seen) or (isinstance(self.at, str) and self.at in now):
            setattr(self.state, self.button, True)
            self.pressed = True
        self.seen.append(now)
        return 0.0


@contextmanager
def job(host: Host, button: str = INTERRUPT, at: int | str | None = None) -> Iterator[User]:
    """The WebUI is at work, and its bar says so; a flag that was raised is taken back at the end, as the
    WebUI does it where the next job begins."""
    active, state = installation.active(), host.shared.state
    assert active is not None
    user = User(state, button, at)
    with pytest.MonkeyPatch.context() as patch:
        for flag in (INTERRUPT, SKIP, "stopping_generation"):
            patch.setattr(state, flag, False)
        patch.setattr(state, "job_count", 1)
        patch.setattr(state, "textinfo", "the WebUI's own")
        patch.setattr(active.progress, "clock", user)
        yield user
        assert state.textinfo == "the WebUI's own"
