"""What is expensive to read from a stored weight, kept while nothing that decides it has changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

NO_PLACES: Mapping[Hashable, Hashable] = MappingProxyType({})


class Memo:
    """Values by key: a DoRA's norms, a GLoRA's product, the largest number of a factor. One per session.

    Keys hold object identities, so each value keeps the objects of its key alive. What was recalled while
    another value was made is used for as long as that one is.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, Any]] = {}
        self._made_of: dict[Hashable, frozenset[Hashable]] = {}
        self._lasting: dict[Hashable, Hashable] = {}
        self._used: set[Hashable] = set()

    def recall(self, key: Hashable, owner: object, make: Callable[[], Value]) -> Value:
        """The value of this key, made if it is new. owner: what the identities in the key belong to."""
        return self.recall_all({key: owner}, lambda missing: {key: make()})[key]

    def recall_all(
        self,
        owners: Mapping[Key, object],
        make: Callable[[Collection[Key]], Mapping[Key, Value]],
        lasting: Mapping[Hashable, Key] = NO_PLACES,  # type: ignore[assignment]
    ) -> dict[Key, Value]:
        """The values of these keys, each with its owner; make: those of the missing ones, all at once.

        lasting: keys that are kept while they are not used too, each until another key has its place.
        """
        missing = [key for key in owners if key not in self._kept]
        if missing:
            outside, self._used = self._used, set()
            try:
                made = make(missing)
                made_of = frozenset(self._used)
            finally:
                self._used |= outside
            for key in missing:
                self._kept[key], self._made_of[key] = (owners[key], made[key]), made_of
        self._lasting.update(lasting)
        for key in owners:
            self._used |= {key, *self._made_of[key]}
        return {key: self._kept[key][1] for key in owners}

    def keep_used(self) -> None:
        """Forget what was not asked for since the last call."""
        wanted = self._used | set(self._lasting.values())
        self._kept = {key: value for key, value in self._kept.items() if key in wanted}
        self._made_of = {key: value for key, value in self._made_of.items() if key in wanted}
        self._used = set()

    def keep_all(self) -> None:
        """Forget nothing now; the next `keep_used` counts what is asked for from here on."""
        self._used = set()
