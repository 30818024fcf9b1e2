"""Turns, and factors outside of a stack, on the device of the input: each is copied there once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from lib_precision_lora.adapters.operators import Operator
from lib_precision_lora.adapters.steps import Add, Turn
from lib_precision_lora.adapters.terms import Hadamard, Kronecker, LowRank, Sparse, Term

Placed = TypeVar("Placed")


class DeviceCopies:
    """What one branch has on one device. A change of strength asks for the same again, and gets it.

    Tensors count by identity, and what was copied is kept alive beside its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies: dict[Hashable, tuple[object, object]] = {}

    def operator(self, operator: Operator) -> Operator:
        return self._once(operator, operator.tensors(), lambda: operator.to(self.device))

    def turns(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        return tuple((self.operator(operator), factor) for operator, factor in turns)

    def addition(self, step: Add) -> Add:
        """The addition on the device; a dense remainder stays where it is, and is streamed."""
        term, change = step.term, step.row_change
        return dataclasses.replace(
            step,
            term=self._once(term, term.tensors(), lambda: on_device(term, self.device)),
            row_change=None
            if change is None
            else self._once(change, (change,), lambda: change.to(self.device)),
            columns=self.turns(step.columns),
        )

    def _once(self, source: Placed, tensors: tuple[Tensor, ...], place: Callable[[], Placed]) -> Placed:
        """The copy of a source that holds these tensors; itself where it holds none."""
        if not tensors:
            return source
        key = type(source), tuple(id(tensor) for tensor in tensors)
        if key not in self._copies:
            self._copies[key] = source, place()
        return cast(Placed, self._copies[key][1])


def copied(step: Add, device: torch.device) -> Add:
    """The addition with its factors on the device, low-rank ones too."""
    here = DeviceCopies(device).addition(step)
    if isinstance(step.term, LowRank):
        term = LowRank(step.term.up.to(device), step.term.down.to(device))
        return dataclasses.replace(here, term=term)
    return here


def on_device(term: Term, device: torch.device) -> Term:
    """The term with its factors on the device, but for low-rank ones (a stack holds those) and dense ones."""
    if isinstance(term, Kronecker):
        return Kronecker(term.left.to(device), tuple(factor.to(device) for factor in term.right))
    if isinstance(term, Hadamard):
        return Hadamard(*(factor.to(device) for factor in term.tensors()))
    if isinstance(term, Sparse):
        return Sparse(term.row.to(device), term.column.to(device), term.value.to(device), term.size)
    return term
