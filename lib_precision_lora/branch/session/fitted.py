"""Adapters made to fit the layer at hand: rows in the host's order, channels as many as the input has."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lib_precision_lora.adapters import Adapter, AdapterError, row_order, with_channels
from lib_precision_lora.branch.session.patch import Patch
from lib_precision_lora.storage import StoredWeight, WidenedWeight

RowFunction = Callable[[Tensor], Tensor]


class FittedAdapters:
    """Adapters with their rows permuted by a host's row function, or with zeros in an input layer's further
    channels; kept, so that the same patch stays the same object."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[Adapter, Adapter]] = {}
        self._used: set[tuple[object, ...]] = set()

    def adapter(self, patch: Patch, stored: StoredWeight) -> Adapter:
        """The adapter for the rows of `stored` that the patch concerns.

        Raises `AdapterError` for a row function that is no reordering, and where the channels do not fit.
        """
        rows = patch.target.rows[1] if patch.target.rows else stored.shape[0]
        adapter, function = patch.adapter, patch.target.row_function
        if function is not None:
            adapter = self._kept(adapter, (function,), lambda given: _reordered(given, function, rows))
        if patch.widens or isinstance(stored, WidenedWeight):
            shape = (rows, *stored.shape[1:])
            if not patch.widens and isinstance(stored, WidenedWeight):
                adapter.check((rows, *stored.own.shape[1:]))
            adapter = self._kept(adapter, shape, lambda given: with_channels(given, shape))
        return adapter

    def keep_used(self) -> None:
        """Forget what was not asked for since the last call."""
        self._made = {key: pair for key, pair in self._made.items() if key in self._used}
        self._used.clear()

    def _kept(
        self, adapter: Adapter, kind: tuple[object, ...], make: Callable[[Adapter], Adapter]
    ) -> Adapter:
        key = (id(adapter), *kind)
        if key not in self._made:
            self._made[key] = adapter, make(adapter)
        self._used.add(key)
        return self._made[key][1]


def _reordered(adapter: Adapter, function: RowFunction, rows: int) -> Adapter:
    order = row_order(function, rows)
    if order is None:
        raise AdapterError("the host's row function is not a reordering of rows")
    return adapter.reordered(order)
