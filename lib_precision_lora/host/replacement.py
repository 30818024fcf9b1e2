"""Swapping a function of the host for ours, reversibly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replacement:
    """`owner.name` becomes `make(original)` until `undo`.

    If somebody has wrapped ours in the meantime, their wrapper stays in place, and what they call passes
    straight through to the original.
    """

    def __init__(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        self.owner, self.name = owner, name
        self.original: Callable[..., Any] = getattr(owner, name)
        self._ours = make(self.original)
        self._active = True

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            return (self._ours if self._active else self.original)(*args, **kwargs)

        dispatch.__name__ = getattr(self.original, "__name__", name)
        dispatch.__wrapped__ = self.original  # type: ignore[attr-defined]
        self._dispatch = dispatch
        setattr(owner, name, dispatch)

    def undo(self) -> None:
        self._active = False
        if getattr(self.owner, self.name) is self._dispatch:
            setattr(self.owner, self.name, self.original)
