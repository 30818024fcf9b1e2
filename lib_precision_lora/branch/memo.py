"""What is expensive to read from a stored weight, kept while nothing that decides it has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class Memo:
    """Tensors by key: a DoRA's norms, a GLoRA's product. One per session.

    Keys hold object identities, so each value keeps the objects of its key alive.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[object, Tensor]] = {}
        self._used: set[Hashable] = set()

    def recall(self, key: Hashable, owner: object, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of this key, made if it is new. owner: what the identities in the key belong to."""
        if key not in self._kept:
            self._kept[key] = owner, make()
        self._used.add(key)
        return self._kept[key][1]

    def keep_used(self) -> None:
        """Forget what was not asked for since the last call."""
        self._kept = {key: value for key, value in self._kept.items() if key in self._used}
        self._used.clear()
