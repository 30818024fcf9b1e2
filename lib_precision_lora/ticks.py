"""How far long work has come.

Whoever calls for the work may show the two numbers of a tick, or raise out of it to have the work given up,
which then leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Callable

Tick = Callable[[int, int], None]
"""Told before each part of the work: how many are done, and how many there are."""

Step = Callable[[], None]
"""Told before each part of the work, by those who do not know how many there are."""


def untold(done: int, total: int) -> None:
    """A tick that nobody hears."""


def uncounted() -> None:
    """A step that nobody counts."""


class Steps:
    """A step that counts, and tells the tick."""

    def __init__(self, total: int, tick: Tick) -> None:
        self._done, self._total, self._tick = 0, total, tick

    def __call__(self) -> None:
        self._tick(min(self._done, self._total), self._total)
        self._done += 1
