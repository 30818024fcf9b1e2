"""What is expensive to read from a stored weight, kept while nothing that decides it has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Memo:
    """Values by key: a DoRA's norms, a GLoRA's product, the largest number of a factor. One per session.

    Keys hold object identities, so each value keeps the objects of its key alive.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, Any]] = {}
        self._used: set[Hashable] = set()

    def recall(self, key: Hashable, owner: object, make: Callable[[], Value]) -> Value:
        """The value of this key, made if it is new. owner: what the identities in the key belong to."""
        if key not in self._kept:
            self._kept[key] = owner, make()
        self._used.add(key)
        value: Value = self._kept[key][1]
        return value

    def keep_used(self) -> None:
        """Forget what was not asked for since the last call."""
        self._kept = {key: value for key, value in self._kept.items() if key in self._used}
        self._used.clear()
