"""Factors that stay in RAM and come to the device layer by layer, one layer ahead of the computation.

While a layer computes, the factors of the next one are copied on a stream of their own from pinned memory,
so that two layers' factors are on the device at once. The order is learned in the first forward.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib_precision_lora.adapters.terms import Dense

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """Operands under way to a device; source: what they are copied from; copied: the moment from which they
    are there (None: now)."""

    device: torch.device
    source: Any
    operands: Any
    copied: torch.cuda.Event | None


class FactorStream:
    """Brings the operands of one session's branches to the device, in the order in which they are used."""

    def __init__(self) -> None:
        self._order: list[weakref.ref[Any]] = []
        self._position: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._ahead: Arrival | None = None
        self._used: list[Any] = []  # those at work, and those before them until the next copy sets out
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    def bring(self, owner: Any, operands: Value, device: torch.device) -> Value:
        """The operands of this branch on the device; those of the next branch set out at the same time.

        owner: the branch, which answers `waiting_for(device)` with the operands that it keeps in RAM for
        it. On a device without streams the copy is made when it is needed.
        """
        arrival, self._ahead = self._ahead, None
        if arrival is None or arrival.source is not operands or arrival.device != device:
            arrival = None  # lets go of what is not wanted, or no longer up to date
            arrival = self._depart(operands, device)
        here: Value = self._receive(arrival)
        following = self._following(owner)
        waiting = None if following is None else following.waiting_for(device)
        if waiting is not None and device.type == "cuda":
            try:
                self._ahead = self._depart(waiting, device)
            except Exception as error:  # noqa: BLE001  no fault of this branch, whose own factors are there
                logger.warning("factors of the next layer were not sent ahead, it asks again: %s", error)
        return here

    def forget(self) -> None:
        """Drop what is under way, and the order."""
        for device, side in self._sides.items():
            side.wait_stream(torch.cuda.current_stream(device))
        self._ahead = None
        self._used.clear()
        self._order.clear()
        self._position.clear()

    def _following(self, owner: Any) -> Any | None:
        """The branch that ran after this one in the last forward; the last one has none."""
        if owner not in self._position:
            self._position[owner] = len(self._order)
            self._order.append(weakref.ref(owner))
        position = self._position[owner] + 1
        return self._order[position]() if position < len(self._order) else None

    def _depart(self, operands: Any, device: torch.device) -> Arrival:
        if device.type != "cuda":
            return Arrival(device, operands, copied_to(operands, device), None)
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side = self._sides[device]
        side.wait_stream(torch.cuda.current_stream(device))
        del self._used[:-1]  # their memory is the side stream's, which now follows all that has read it
        with torch.cuda.stream(side):
            copy = copied_to(operands, device, non_blocking=True)
        return Arrival(device, operands, copy, side.record_event())

    def _receive(self, arrival: Arrival) -> Any:
        if arrival.copied is not None:
            torch.cuda.current_stream(arrival.device).wait_event(arrival.copied)
            self._used.append(arrival.operands)
        return arrival.operands


def copied_to(operands: Value, device: torch.device, non_blocking: bool = False) -> Value:
    """The operands with every tensor copied to the device; a tensor that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.to(device, non_blocking=non_blocking, copy=True)
        return copies[id(tensor)]

    return map_tensors(operands, copy)


def pinned(operands: Value) -> Value:
    """The operands in memory from which a card copies by itself; as they are where there is none left."""
    try:
        return map_tensors(operands, _pinned)
    except RuntimeError as error:
        logger.warning("No pinned memory for streamed LoRA factors, they are streamed slower: %s", error)
        return operands


def map_tensors(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """The same nest of dataclasses, tuples and mappings, every tensor changed but for dense remainders, which
    stay where they are and are brought over row block by row block."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if isinstance(value, Dense):
        return value
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}  # type: ignore[return-value]
    if isinstance(value, tuple):
        return tuple(map_tensors(item, change) for item in value)  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            field.name: map_tensors(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **parts)
    return value


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.contiguous().pin_memory()
