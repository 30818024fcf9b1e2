"""The effective weight: what a stack of adapters makes of one stored weight, without writing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import Adapter, AdapterError
from lib_precision_lora.adapters.terms import Segment
from lib_precision_lora.branch.factors import half_factors
from lib_precision_lora.storage import StoredWeight

ROW_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class EffectiveWeight:
    """`W_eff[s] = (1 + dL) · W0[s] + Σ scale · up · down + Σ scale · D` for each row segment s.

    The form is closed under `apply`, so a whole stack, in prompt order, is one such value. It refers to
    the tensors of the adapters and of the stored weight, and copies neither.
    """

    stored: StoredWeight
    segments: tuple[Segment, ...]

    @classmethod
    def identity(cls, stored: StoredWeight) -> EffectiveWeight:
        """`W_eff = W0`."""
        return cls(stored, (Segment(0, stored.shape[0]),))

    def apply(
        self, adapter: Adapter, strength: float = 1.0, rows: tuple[int, int] | None = None
    ) -> EffectiveWeight:
        """`W + strength · (A(W) − W)` on the running weight.

        rows: (start, length) of the part that the adapter concerns; all rows where None.
        Raises `AdapterError` where the adapter does not fit, or a number is not finite.
        """
        start, length = self._range(rows)
        if not math.isfinite(strength):
            raise AdapterError(f"the strength is {strength}, it must be a finite number")
        adapter.check((length, *self.stored.shape[1:]))
        return EffectiveWeight(
            self.stored,
            tuple(
                adapter.compose(segment, strength, segment.start - start)
                if start <= segment.start < start + length
                else segment
                for segment in self._cut(start, start + length)
            ),
        )

    def scaled(self, factor: float, rows: tuple[int, int] | None = None) -> EffectiveWeight:
        """`factor · W_eff`, on these rows: (start, length), all where None.

        Raises `AdapterError` where the rows are not there, or the factor is not finite.
        """
        start, length = self._range(rows)
        if not math.isfinite(factor):
            raise AdapterError(f"the base weight's factor is {factor}, it must be a finite number")
        return EffectiveWeight(
            self.stored,
            tuple(
                segment.scaled(factor) if start <= segment.start < start + length else segment
                for segment in self._cut(start, start + length)
            ),
        )

    @property
    def is_identity(self) -> bool:
        return all(segment.is_identity for segment in self.segments)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`W_eff − W0`, materialized; for tests, reports and vectors (never in a forward).

        dtype: the arithmetic of the products. float16 is that of the branch's fp16 mode, fp16 products
        with fp32 sums. The result is float32, or float64 for float64.
        """
        result = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = [
            self._delta_rows(segment, start, stop, dtype, result)
            for segment in self.segments
            for start, stop in self._row_blocks(segment)
        ]
        return torch.cat(blocks)

    def _range(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        """(start, length), checked."""
        start, length = rows if rows is not None else (0, self.stored.shape[0])
        if not 0 <= start < start + length <= self.stored.shape[0]:
            raise AdapterError(
                f"rows {start} to {start + length} of a weight that has {self.stored.shape[0]}"
            )
        return start, length

    def _cut(self, *rows: int) -> Iterator[Segment]:
        """The segments, split wherever one of these rows lies inside of one."""
        for segment in self.segments:
            rest = segment
            for row in rows:
                if rest.start < row < rest.stop:
                    upper, rest = rest.split(row)
                    yield upper
            yield rest

    def _row_blocks(self, segment: Segment) -> Iterator[tuple[int, int]]:
        columns = math.prod(self.stored.shape[1:])
        height = max(1, ROW_BLOCK_BYTES // (8 * columns))
        for start in range(segment.start, segment.stop, height):
            yield start, min(start + height, segment.stop)

    def _delta_rows(
        self, segment: Segment, start: int, stop: int, dtype: torch.dtype, result: torch.dtype
    ) -> Tensor:
        shape = (stop - start, *self.stored.shape[1:])
        delta = torch.zeros(shape, dtype=result, device=_device(segment))
        for term in segment.terms:
            first = term.first + start - segment.start
            up, down = term.up[first : first + stop - start], term.down
            if dtype == torch.float16:
                product = half_factors(up, down).product()
            else:
                product = up.to(result) @ down.to(result)
            delta += term.scale * product.reshape(shape)
        for dense in segment.dense:
            first = dense.first + start - segment.start
            delta += dense.scale * dense.value[first : first + stop - start].to(delta)
        if segment.left != 0.0:
            delta += segment.left * self.stored.rows(start, stop, result).to(delta)
        return delta


def _device(segment: Segment) -> torch.device:
    """The device on which the adapters of a segment lie."""
    for term in segment.terms:
        return term.up.device
    for dense in segment.dense:
        return dense.value.device
    return torch.device("cpu")
