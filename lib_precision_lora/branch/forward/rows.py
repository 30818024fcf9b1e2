"""The output side of a branch, shared by linear and convolutional modules: rows are output channels.

    plain:   y[:, s] += hidden[:, columns] · upᵀ + others + b
    turned:  z = (y − bias) + Σ share · W0 (R − I) x
             then phase by phase  z ← L z + additions;  y = z + bias + b

All parts are summed in fp32 and meet y in one rounding, block by block in y's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.algebra.effective import Piece
from lib_precision_lora.branch.forward.operands import Operands, RowRange
from lib_precision_lora.memory.chunks import DENSE_BLOCK_BYTES, WORKSPACE_BYTES


class BranchInput(Protocol):
    """The input side, of one block of tokens (or of the positions of one sample)."""

    def hidden(self) -> Tensor | None:
        """`x · downᵀ · diag(scale)`: [tokens, total rank] fp32; None without a stack."""
        ...

    def dense(self, rows: Tensor, turns: Sequence[Turn]) -> Tensor:
        """`x' * rows`: [tokens, rows] fp32, x' the turned input; rows: [rows, …] fp32."""
        ...

    def kronecker(self, term: Kronecker, turns: Sequence[Turn]) -> Tensor:
        """`x' * (left ⊗ right)`: [tokens, a · p] fp32."""
        ...

    def base(self, turns: Sequence[Turn]) -> Tensor:
        """`W0 (R − I) x`, without the bias: [tokens, out], one more pass through the module."""
        ...


def add_rows(
    operands: Operands, given: BranchInput, y: Tensor, bias: Tensor | None, window: tuple[int, int]
) -> None:
    """The branch on one block of tokens, in place.

    y: [tokens, out], any strides; bias: [out], the module's own; window: the output rows to treat (one
    group of a grouped convolution, else all).
    """
    hidden = given.hidden()
    if operands.plain:
        for row_range in operands.phases[0].ranges:
            if row_range.up is None and not row_range.others and operands.bias is None:
                continue
            for start, stop in _blocks(row_range, y.shape[0], window):
                _add_block(operands, row_range, start, stop, hidden, given, y)
        return
    _add_turned(operands, given, hidden, y, bias, window)


def _add_block(
    operands: Operands,
    row_range: RowRange,
    start: int,
    stop: int,
    hidden: Tensor | None,
    given: BranchInput,
    y: Tensor,
) -> None:
    """Rows [start, stop) of a plain branch, in place; nothing of them is alive when the next are made."""
    delta = _additions(operands, row_range, start, stop, hidden, given)
    if operands.bias is not None:
        delta += operands.bias[start:stop]
    accumulate(y[:, start:stop], delta)


def _add_turned(
    operands: Operands,
    given: BranchInput,
    hidden: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    window: tuple[int, int],
) -> None:
    low, high = window
    z = y[:, low:high].to(torch.float32, copy=True)
    offset: Tensor | None = None
    if bias is not None:
        offset = bias[low:high].to(device=y.device, dtype=torch.float32)
        z -= offset
    for piece in operands.pieces:
        if piece.turns:
            _add_base(piece, given, z[:, piece.start : piece.stop])
    for phase in operands.phases:
        for left in phase.lefts:
            _turn_outputs(left, z, window)
        for row_range in phase.ranges:
            for start, stop in _blocks(row_range, y.shape[0], window):
                z[:, start - low : stop - low] += _additions(operands, row_range, start, stop, hidden, given)
    if operands.bias is not None:
        offset = operands.bias[low:high] if offset is None else offset + operands.bias[low:high]
    y[:, low:high].copy_(z if offset is None else z.add_(offset))


def _add_base(piece: Piece, given: BranchInput, z: Tensor) -> None:
    """`z += share · W0 (R − I) x`, on the rows of the piece; nothing of it outlives the sum."""
    shift = given.base(piece.turns)[:, piece.start : piece.stop]
    z += shift if piece.share is None else shift * piece.share


def _turn_outputs(left: Left, z: Tensor, window: tuple[int, int]) -> None:
    """`z ← z + factor · dM z` in place, on those rows of the window that the turn concerns."""
    start, stop = max(left.start, window[0]), min(left.stop, window[1])
    if start >= stop:
        return
    whole = (start, stop) == (left.start, left.stop)
    operator = left.operator if whole else left.operator.part(start - left.start, stop - left.start)
    rows = slice(start - window[0], stop - window[0])
    z[:, rows].add_(operator.deviation(z[:, rows]), alpha=left.factor)


def accumulate(y: Tensor, delta: Tensor | float) -> None:
    """`y += delta` with an fp32 sum and one rounding, in place.

    CPU and CUDA add across types in one pass; other backends are not sure to, and take the long way.
    """
    if y.device.type in ("cpu", "cuda") or y.dtype == torch.float32:
        y.add_(delta)
    else:
        y.copy_(y.float() + delta)


def _additions(
    operands: Operands,
    row_range: RowRange,
    start: int,
    stop: int,
    hidden: Tensor | None,
    given: BranchInput,
) -> Tensor | float:
    """What is added to rows [start, stop) of a range: [tokens, stop − start] fp32, or 0."""
    delta: Tensor | float = 0.0
    if row_range.up is not None and hidden is not None:
        up = row_range.up[start - row_range.start : stop - row_range.start]
        delta = operands.product(linear, hidden[:, row_range.columns], up, (-1,))
    for step in row_range.others:
        delta = _sum(delta, _other(step, start, stop, given))
    return delta


def _sum(delta: Tensor | float, other: Tensor) -> Tensor:
    return delta.add_(other) if isinstance(delta, Tensor) else other


def _other(step: Add, start: int, stop: int, given: BranchInput) -> Tensor:
    """A dense or Kronecker addition to rows [start, stop) of the weight."""
    first, last = step.first + start - step.start, step.first + stop - step.start
    if isinstance(step.term, Kronecker):
        part = given.kronecker(step.term, step.columns)[:, first:last]
    else:
        numbers = torch.arange(first, last, device=step.term.tensors()[0].device)
        part = given.dense(step.term.rows(numbers, torch.float32), step.columns)
    if step.row_change is not None:
        part *= 1.0 + step.row_change[start - step.start : stop - step.start].to(part)
    return part.mul_(step.scale)


def _blocks(row_range: RowRange, tokens: int, window: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Parts of the range, within the window, whose output and part of D keep within their bounds."""
    height = WORKSPACE_BYTES // (8 * max(1, tokens))
    for step in row_range.others:
        if isinstance(step.term, Kronecker):
            height = row_range.stop - row_range.start
        else:
            height = min(height, DENSE_BLOCK_BYTES // (4 * max(1, step.term.size[1])))
    first, last = max(row_range.start, window[0]), min(row_range.stop, window[1])
    for start in range(first, last, max(1, height)):
        yield start, min(start + max(1, height), last)
