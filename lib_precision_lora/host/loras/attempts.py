"""Several attempts to attach, of which the last counts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lib_precision_lora.branch import PatchError


class Attempts:
    """While the host loads models, one may be brought to its LoRAs more than once before it runs. What its
    forwards run with is what the last time has left; what failed before that is nobody's loss.

    tell: given a model, and what was left out of it.
    """

    def __init__(self, tell: Callable[[nn.Module, Sequence[PatchError]], None]) -> None:
        self._tell = tell
        self._loading = 0
        self._last: weakref.WeakKeyDictionary[nn.Module, Sequence[PatchError]] = weakref.WeakKeyDictionary()

    def made(self, model: nn.Module, problems: Sequence[PatchError]) -> None:
        """A model was brought to its LoRAs, but for these problems."""
        if self._loading:
            self._last[model] = problems
        else:
            self._tell(model, problems)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While the host loads models; how it ended is told at the end, whatever that is."""
        self._loading += 1
        try:
            yield
        finally:
            self._loading -= 1
            if not self._loading:
                last, self._last = self._last, weakref.WeakKeyDictionary()
                for model, problems in last.items():
                    self._tell(model, problems)
