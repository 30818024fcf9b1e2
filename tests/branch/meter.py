"""What a piece of code allocates: the largest tensor that one operation makes, and the peak of all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Counts the storages that operations return and nobody held before.

    largest: elements of the largest tensor with memory of its own; peak: bytes of all storages alive at once;
    operations: how many ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = self.alive = self.operations = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        op: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, Tensor)
        }
        result = op(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._known or not size:
            return
        self._known.add(pointer)
        self.largest = max(self.largest, size // tensor.element_size())
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, pointer, size)

    def _forget(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.alive -= size


def metered(run: Callable[[], object]) -> Meter:
    """The meter of one run, whose result it keeps alive to the end."""
    with torch.no_grad(), Meter() as meter:
        result = run()
    del result
    return meter
