"""What makes two stacks of steps the same, for deciding what can stay as it is.

Tensors count by identity: whoever keeps an identity keeps the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lib_precision_lora.adapters.operators import Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn


class TurnedRows(Protocol):
    """Rows of the base with the turns of their input, and how much of each row is turned so."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def turns(self) -> tuple[Turn, ...]: ...
    @property
    def share(self) -> Tensor | None: ...


def structure(pieces: Sequence[TurnedRows], steps: Sequence[Add | Left]) -> tuple[object, ...]:
    """Equal where two stacks differ in strengths only."""
    turned_rows = tuple((p.start, p.stop, _operators(p.turns), id(p.share)) for p in pieces)
    return turned_rows, tuple(_step(step) for step in steps)


def exact_identity(pieces: Sequence[TurnedRows], steps: Sequence[Add | Left]) -> tuple[object, ...]:
    """Equal where two stacks are the same, strengths included."""
    strengths = tuple(step.scale if isinstance(step, Add) else step.factor for step in steps)
    turns = tuple(factor for piece in pieces for _, factor in piece.turns)
    return structure(pieces, steps), strengths, turns


def _step(step: Add | Left) -> tuple[object, ...]:
    """A turn of inputs is folded into the factors before it, so that its strength is part of theirs."""
    if isinstance(step, Left):
        return step.start, step.stop, _operator(step.operator)
    tensors = tuple(id(tensor) for tensor in step.term.tensors())
    folded = tuple(factor for _, factor in step.columns)
    return step.start, step.stop, step.first, tensors, id(step.row_change), _operators(step.columns), folded


def _operators(turns: Sequence[Turn]) -> tuple[object, ...]:
    return tuple(_operator(operator) for operator, _ in turns)


def _operator(operator: Operator) -> tuple[object, ...]:
    tensors = tuple(id(tensor) for tensor in operator.tensors())
    return type(operator), tensors, getattr(operator, "value", None)
