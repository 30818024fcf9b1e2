"""Reading an effective weight, or its delta, in blocks of bounded size.

For norms (DoRA), folded products (GLoRA), reports and tests. Rows are read in blocks; where a step mixes
rows (a rotation of outputs) all rows are read for a few columns at a time instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.algebra.identity import TurnedRows
from lib_precision_lora.branch.arithmetic.device_copies import copied
from lib_precision_lora.branch.arithmetic.factors import half_factors
from lib_precision_lora.storage import StoredWeight
from lib_precision_lora.strict_product import multiply

BLOCK_BYTES = 10 * 2**20
"""One block in the arithmetic's type; about five live at once, which keeps reading below 64 MiB."""


def reading_bytes(shape: Sequence[int], steps: Sequence[Add | Left], element: int) -> int:
    """What reading a weight of this shape with these steps takes at most; element: bytes of the arithmetic's
    type. Of blocks, about five live at once, and one more where they are read by column."""
    block = min(BLOCK_BYTES, element * math.prod(shape))
    mixing = any(isinstance(step, Left) and step.operator.mixes for step in steps)
    return (6 if mixing else 5) * block


class Reader:
    """Blocks of `W_eff` and of `W_eff − W0`; dtype is the arithmetic, fp16 that of the fp16 mode."""

    def __init__(
        self,
        stored: StoredWeight,
        pieces: Sequence[TurnedRows],
        steps: Sequence[Add | Left],
        dtype: torch.dtype,
    ) -> None:
        self.stored, self.pieces, self.steps = stored, pieces, steps
        self.half = dtype == torch.float16
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.rows, self.width = stored.shape[0], math.prod(stored.shape[1:])
        self._mixing = any(isinstance(step, Left) and step.operator.mixes for step in steps)
        self._needs_base = any(isinstance(step, Left) for step in steps) or any(p.turns for p in pieces)
        self._copies: dict[tuple[int, torch.device], Add] = {}

    def delta(self) -> Tensor:
        """`W_eff − W0`, whole: [rows, columns]."""
        if self._mixing:
            return self._delta(0, self.rows, self._base(0, self.rows))
        return torch.cat(
            [
                self._delta(low, high, self._base(low, high) if self._needs_base else None)
                for low, high in self._row_blocks(0, self.rows)
            ]
        )

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """W_eff as (rows, columns, values), each value once."""
        if not self._mixing:
            for low, high in self._row_blocks(0, self.rows):
                yield slice(low, high), slice(0, self.width), self._rows(low, high)
            return
        for columns in self._column_blocks():
            yield slice(0, self.rows), columns, self._some_columns(columns)

    def row_squares(self, start: int, stop: int) -> Tensor:
        """`Σⱼ W_eff[i, j]²` of rows [start, stop), fp64 on the CPU."""
        if not self._mixing:
            return torch.cat([_squares(self._rows(*block), 1) for block in self._row_blocks(start, stop)])
        squares = [_squares(self._some_columns(columns)[start:stop], 1) for columns in self._column_blocks()]
        return torch.stack(squares).sum(0)

    def column_squares(self, start: int, stop: int) -> Tensor:
        """`Σᵢ W_eff[i, j]²` over rows [start, stop), fp64 on the CPU."""
        if not self._mixing:
            squares = [_squares(self._rows(*block), 0) for block in self._row_blocks(start, stop)]
            return torch.stack(squares).sum(0)
        return torch.cat(
            [_squares(self._some_columns(columns)[start:stop], 0) for columns in self._column_blocks()]
        )

    def times(self, start: int, stop: int, matrix: Tensor) -> Tensor:
        """`W_eff[start:stop] · matrix`; matrix: [columns, n]."""
        if not self._mixing:
            return torch.cat([_times(self._rows(*rows), matrix) for rows in self._row_blocks(start, stop)])
        products = [
            _times(self._some_columns(columns)[start:stop], matrix[columns])
            for columns in self._column_blocks()
        ]
        return torch.stack(products).sum(0)

    def _row_blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        height = max(1, BLOCK_BYTES // (self.dtype.itemsize * max(1, self.width)))
        for low in range(start, stop, height):
            yield low, min(low + height, stop)

    def _column_blocks(self) -> Iterator[slice]:
        count = max(1, BLOCK_BYTES // (self.dtype.itemsize * self.rows))
        for first in range(0, self.width, count):
            yield slice(first, min(first + count, self.width))

    def _rows(self, low: int, high: int) -> Tensor:
        base = self._base(low, high)
        return base + self._delta(low, high, base)

    def _some_columns(self, columns: slice) -> Tensor:
        """All rows of W_eff, these columns."""
        base = self._base(0, 0).new_empty(self.rows, columns.stop - columns.start)
        delta = torch.empty_like(base)
        for low, high in self._row_blocks(0, self.rows):
            self._put_columns(low, high, columns, base[low:high], delta[low:high])
        return base.add_(self._steps(0, self.rows, base, delta, columns))

    def _put_columns(self, low: int, high: int, columns: slice, base: Tensor, delta: Tensor) -> None:
        """`W0` and `W0 · R − W0` of rows [low, high), these columns, into base and delta."""
        block = self._base(low, high)
        base.copy_(block[:, columns])
        delta.copy_(self._turned(low, high, block)[:, columns])

    def _base(self, low: int, high: int) -> Tensor:
        """W0: [high − low, columns]."""
        base = self.stored.rows(low, high, torch.float32)
        if self.dtype == torch.float64 and not has_fp64(base.device):
            base = base.cpu()
        return base.to(self.dtype).reshape(high - low, self.width)

    def _delta(self, low: int, high: int, base: Tensor | None) -> Tensor:
        shape, device = (high - low, self.width), self._device(base)
        turned = (
            self._turned(low, high, base)
            if base is not None
            else torch.zeros(shape, dtype=self.dtype, device=device)
        )
        return self._steps(low, high, base, turned, slice(None))

    def _turned(self, low: int, high: int, base: Tensor) -> Tensor:
        """`W0 · R − W0` for rows [low, high)."""
        delta = torch.zeros_like(base)
        for piece in self.pieces:
            rows = _overlap(piece.start, piece.stop, low, high)
            if rows is None or not piece.turns:
                continue
            part = base[rows]
            total = torch.zeros_like(part)
            for operator, factor in piece.turns:
                total = total + factor * operator.to(base.device).transposed(part + total)
            if piece.share is not None:
                first = low + rows.start - piece.start
                total = total * piece.share[first : first + len(part), None].to(total)
            delta[rows] += total
        return delta

    def _steps(self, low: int, high: int, base: Tensor | None, delta: Tensor, columns: slice) -> Tensor:
        """The delta after all steps, from that of the turned base; rows [low, high), these columns."""
        for step in self.steps:
            rows = _overlap(step.start, step.stop, low, high)
            if rows is None:
                continue
            if isinstance(step, Add):
                here = self._where(step, delta.device)
                for top, bottom in self._row_blocks(rows.start, rows.stop):
                    first, last = low + top - step.start, low + bottom - step.start
                    delta[top:bottom] += self._block(here, first, last)[:, columns].to(delta.device)
                continue
            assert base is not None
            operator = step.operator.to(delta.device)
            if not operator.mixes:
                first = low + rows.start - step.start
                operator = operator.part(first, first + rows.stop - rows.start)
            delta[rows] += step.factor * operator.deviation((base[rows] + delta[rows]).T).T
        return delta

    def _where(self, step: Add, device: torch.device) -> Add:
        """The addition with its factors where the base is read, if that is an accelerator: copied once."""
        if device.type == "cpu":
            return step
        key = id(step), device
        if key not in self._copies:
            self._copies[key] = copied(step, device)
        return self._copies[key]

    def _block(self, step: Add, first: int, last: int) -> Tensor:
        """Rows [first, last) of what a step adds, all columns."""
        start, stop = step.first + first, step.first + last
        if self.half and isinstance(step.term, LowRank):
            block = half_factors(step.term.up, step.term.down).part(start, stop).product()
        else:
            numbers = torch.arange(start, stop, device=step.term.tensors()[0].device)
            block = step.term.rows(numbers, self.dtype)
        if step.row_change is not None:
            block = block + block * step.row_change[first:last, None].to(block)
        for operator, factor in step.columns:
            block = block + factor * operator.to(block.device).transposed(block)
        return step.scale * block

    def _device(self, base: Tensor | None) -> torch.device:
        if base is not None:
            return base.device
        for step in self.steps:
            if isinstance(step, Add):
                return step.term.tensors()[0].device
        return torch.device("cpu")


def _times(block: Tensor, matrix: Tensor) -> Tensor:
    """`block · matrix`, in the block's type."""
    return multiply(block, matrix.to(block))


def _squares(block: Tensor, axis: int) -> Tensor:
    """The sum of squares over an axis, on the CPU."""
    return block.square().sum(axis).cpu()


def has_fp64(device: torch.device) -> bool:
    """Some accelerators have none (MPS, some XPUs): what needs it is then done on the CPU."""
    return device.type in ("cpu", "cuda")


def _overlap(start: int, stop: int, low: int, high: int) -> slice | None:
    """Rows [start, stop) as they lie within [low, high), counted from low; None where they do not."""
    first, last = max(start, low), min(stop, high)
    return slice(first - low, last - low) if first < last else None
