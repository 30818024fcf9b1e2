"""The form of a running weight whose norms need no dense delta.

W = diag(base) · W0 + Σₖ diag(scaleₖ) · Uₖ Vₖ
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.algebra.identity import TurnedRows

Scale = float | Tensor
"""One factor for all rows, or one for each: [rows] fp64 on the CPU."""


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTerm:
    """`diag(scale) · U V` on rows [start, stop) of the form; U: the term's up from row `first` on, V: its
    down."""

    start: int
    stop: int
    term: LowRank
    first: int
    scale: Scale

    @property
    def up(self) -> Tensor:
        """U: [stop − start, rank], in the file's type."""
        return self.term.up.narrow(0, self.first, self.stop - self.start)


@dataclass(frozen=True, slots=True, eq=False)
class LowRankForm:
    """The formula above, for a number of rows."""

    rows: int
    base: Scale
    terms: tuple[ScaledTerm, ...]

    @property
    def rank(self) -> int:
        return sum(part.term.rank for part in self.terms)

    @property
    def is_uniform(self) -> bool:
        """All rows have the same scales and terms, so that columns have norms in closed form too."""
        return not isinstance(self.base, Tensor) and all(
            not isinstance(part.scale, Tensor) and (part.start, part.stop) == (0, self.rows)
            for part in self.terms
        )


def low_rank_form(
    pieces: Sequence[TurnedRows], steps: Sequence[Add | Left], start: int, stop: int
) -> LowRankForm | None:
    """Rows [start, stop) in this form. None where they have none: turned inputs, rotated outputs, a term that
    is not of low rank, or ranks beyond the number of rows, whose products would be no cheaper."""
    if any(piece.turns and piece.start < stop and start < piece.stop for piece in pieces):
        return None
    rows = stop - start
    base: Scale = 1.0
    terms: list[ScaledTerm] = []
    for step in steps:
        low, high = max(step.start, start), min(step.stop, stop)
        if low >= high:
            continue
        if isinstance(step, Left):
            if step.operator.mixes:
                return None
            factor = _factor(step, low, high)
            base = _multiplied(base, factor, low - start, high - start, rows)
            terms = [_scaled_part(part, factor, low - start, high - start) for part in terms]
        elif isinstance(step.term, LowRank) and not step.columns:
            scale = _scale(step, low, high)
            terms.append(
                ScaledTerm(low - start, high - start, step.term, step.first + low - step.start, scale)
            )
        else:
            return None
    form = LowRankForm(rows, base, tuple(terms))
    return form if form.rank <= rows else None


def _factor(step: Left, low: int, high: int) -> Scale:
    """What an operator that does not mix multiplies rows [low, high) by."""
    if not step.operator.tensors():
        one = torch.ones(1, dtype=torch.float64)
        return 1.0 + step.factor * float(step.operator.deviation(one))
    part = step.operator.part(low - step.start, high - step.start)
    return 1.0 + step.factor * part.to(torch.device("cpu")).deviation(
        torch.ones(high - low, dtype=torch.float64)
    )


def _scale(step: Add, low: int, high: int) -> Scale:
    if step.row_change is None:
        return step.scale
    change = step.row_change.narrow(0, low - step.start, high - low)
    return step.scale * (1.0 + change.to("cpu", torch.float64))


def _scaled_part(part: ScaledTerm, factor: Scale, low: int, high: int) -> ScaledTerm:
    """The part after rows [low, high) of the form were multiplied by the factor."""
    first, last = max(part.start, low), min(part.stop, high)
    if first >= last:
        return part
    here = factor.narrow(0, first - low, last - first) if isinstance(factor, Tensor) else factor
    scale = _multiplied(part.scale, here, first - part.start, last - part.start, part.stop - part.start)
    return dataclasses.replace(part, scale=scale)


def _multiplied(scale: Scale, factor: Scale, low: int, high: int, rows: int) -> Scale:
    """The scale of so many rows, of which [low, high) are multiplied by the factor."""
    if (low, high) == (0, rows):
        return scale * factor
    whole = scale.clone() if isinstance(scale, Tensor) else torch.full((rows,), scale, dtype=torch.float64)
    whole.narrow(0, low, high - low).mul_(factor)
    return whole
