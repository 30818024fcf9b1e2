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
    return _pieces(pieces), tuple(_step(step) for step in steps)


def exact_identity(pieces: Sequence[TurnedRows], steps: Sequence[Add | Left]) -> tuple[object, ...]:
    """Equal where two stacks are the same, strengths included."""
    strengths = tuple(step.scale if isinstance(step, Add) else step.factor for step in steps)
    return structure(pieces, steps), strengths


def _pieces(pieces: Sequence[TurnedRows]) -> tuple[object, ...]:
    return tuple((piece.start, piece.stop, _turns(piece.turns), id(piece.share)) for piece in pieces)


def _step(step: Add | Left) -> tuple[object, ...]:
    if isinstance(step, Left):
        return step.start, step.stop, _operator(step.operator)
    tensors = tuple(id(tensor) for tensor in step.term.tensors())
    return step.start, step.stop, step.first, tensors, id(step.row_change), _turns(step.columns)


def _turns(turns: Sequence[Turn]) -> tuple[object, ...]:
    """A turn of inputs is folded into the factors, so that its strength is part of the structure."""
    return tuple((_operator(operator), factor) for operator, factor in turns)


def _operator(operator: Operator) -> tuple[object, ...]:
    tensors = tuple(id(tensor) for tensor in operator.tensors())
    return type(operator), tensors, getattr(operator, "value", None)
