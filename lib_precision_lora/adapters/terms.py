"""The terms of an effective weight, as plain values.

    W_eff[start:stop] = L · W0[start:stop] + Σ scaleᵢ · upᵢ · downᵢ + Σ scaleⱼ · Dⱼ

Every adapter composes itself into these. They hold tensors of the file as they are (no copies, file
precision) and the strengths as separate numbers, so that a change of strength touches no tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`scale · up[first : first + height] · down`, over a segment of `height` rows.

    up: [≥ first + height, rank]; down: [rank, columns], where columns is the product of the weight's
    trailing dimensions (kernel included).
    """

    up: Tensor
    down: Tensor
    scale: float
    first: int = 0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """`scale · value[first : first + height]`, over a segment of `height` rows.

    value: [≥ first + height, …], trailing dimensions as the weight's.
    """

    value: Tensor
    scale: float
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Rows [start, stop) of one effective weight: `(1 + left) · W0 + Σ terms + Σ dense`.

    left: the deviation dL of L = (1 + dL) · I, a number kept in double precision; 0 leaves W0 as it is
    and −1 takes it away.
    """

    start: int
    stop: int
    left: float = 0.0
    terms: tuple[LowRank, ...] = ()
    dense: tuple[Dense, ...] = ()

    @property
    def is_identity(self) -> bool:
        return self.left == 0.0 and not self.terms and not self.dense

    def scaled(self, factor: float) -> Segment:
        """`factor · W`: what a host's `strength_model` does to the running weight."""
        return dataclasses.replace(
            self,
            left=(1.0 + self.left) * factor - 1.0,
            terms=tuple(dataclasses.replace(term, scale=term.scale * factor) for term in self.terms),
            dense=tuple(dataclasses.replace(term, scale=term.scale * factor) for term in self.dense),
        )

    def split(self, row: int) -> tuple[Segment, Segment]:
        """The same weight as two segments that meet at `row` (start < row < stop)."""
        upper = dataclasses.replace(self, stop=row)
        shift = row - self.start
        lower = dataclasses.replace(
            self,
            start=row,
            terms=tuple(dataclasses.replace(term, first=term.first + shift) for term in self.terms),
            dense=tuple(dataclasses.replace(term, first=term.first + shift) for term in self.dense),
        )
        return upper, lower
