"""Squares of the rows or columns of a weight of the form `diag(a) · W0 + Σₖ diag(ρₖ) · Uₖ Vₖ`.

    ‖Wᵢ‖² = a² ‖W0ᵢ‖² + 2 a Σₖ ρₖ ⟨W0ᵢ Vₖᵀ, Uₖᵢ⟩ + Σₖₗ ρₖ ρₗ ⟨Uₖᵢ Vₖ Vₗᵀ, Uₗᵢ⟩

‖W0ᵢ‖² belongs to the base, each product to one term or to two: they are kept, so that the base is read once,
and again only for terms that are new. Columns are the rows of W0ᵀ, whose terms are Vₖᵀ Uₖᵀ.

W0 Vᵀ is an fp32 product, the rest fp64. Where the sum cancels, the fp32 product would show: such a norm is
told from the sizes of the terms, and is for the caller to find in another way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Literal

import torch
from torch import Tensor

from lib_precision_lora.branch.algebra.base_reading import CACHED_BLOCK_BYTES, column_reading, row_reading
from lib_precision_lora.branch.algebra.low_rank_form import LowRankForm, ScaledTerm
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.storage import StoredWeight

Axis = Literal["row", "column"]

CANCELLED = 1 / 16
"""A sum of squares below this part of what its terms are without their signs is not trusted."""


@dataclass(frozen=True, slots=True)
class Product:
    """One value that is kept. base: ‖W0‖², fp64 [n]; one term: fp32 [2, n], ⟨W0 Vᵀ, U⟩ and Σ U² ‖V‖²; two
    terms: ⟨U V Vᵀ, U⟩, fp32 [n] of the rows that both have."""

    key: Hashable
    terms: tuple[ScaledTerm, ...]
    length: int

    @property
    def nbytes(self) -> int:
        return 8 * self.length if len(self.terms) < 2 else 4 * self.length


def products(form: LowRankForm, axis: Axis, columns: int) -> tuple[Product, ...]:
    """What the squares of this form are made of: the base, each term, and each two."""

    def product(*terms: ScaledTerm) -> Product:
        names = tuple((_name(term), term.start, term.stop) for term in terms)
        start, stop = _shared(form.rows, terms)
        return Product((axis, *names), terms, stop - start if axis == "row" else columns)

    pairs = [
        product(one, other)
        for one, other in combinations_with_replacement(form.terms, 2)
        if axis == "column" or max(one.start, other.start) < min(one.stop, other.stop)
    ]
    return product(), *(product(term) for term in form.terms), *pairs


def squares(
    form: LowRankForm,
    axis: Axis,
    stored: StoredWeight,
    start: int,
    memo: Memo,
    place: Hashable,
    base: Hashable,
) -> tuple[Tensor, Tensor]:
    """(squares, sure): fp64 [n] and bool [n] on the CPU; n is the form's rows, or W0's columns.

    start: the first of the form's rows in W0; memo: where the products are kept; place: what tells these rows
    from those of other weights; base: what tells them from all others that were or will be in this place.
    sure: false where the sum cancels, or is not finite.
    """
    made_of = products(form, axis, math.prod(stored.shape[1:]))
    kept = memo.recall_all(
        {(base, part.key): tuple(term.term for term in part.terms) for part in made_of},
        lambda missing: {
            (base, key): value
            for key, value in _made(
                [part for part in made_of if (base, part.key) in missing], form.rows, axis, stored, start
            ).items()
        },
        lasting={(place, axis): (base, made_of[0].key)},
    )
    total = form.base * form.base * kept[base, made_of[0].key]
    size = total.sqrt()
    spread = torch.zeros_like(total)
    for part in made_of[1:]:
        first, last = _shared(form.rows, part.terms) if axis == "row" else (0, len(total))
        value = kept[base, part.key].double()
        scales = [_part(term.scale, first - term.start, last - first) for term in part.terms]
        here = total.narrow(0, first, last - first)
        if len(scales) == 1:
            here.add_(2.0 * _part(form.base, first, last - first) * scales[0] * value[0])
            spread.narrow(0, first, last - first).add_(scales[0] * scales[0] * value[1])
        else:
            twice = 1.0 if part.terms[0] is part.terms[1] else 2.0
            here.add_(twice * scales[0] * scales[1] * value)
    return total, total.isfinite() & (total >= CANCELLED * (size + spread.sqrt()).square())


def _made(
    missing: Sequence[Product], rows: int, axis: Axis, stored: StoredWeight, start: int
) -> Mapping[Hashable, Tensor]:
    """The values of what is not kept yet; those that need W0 in one reading of it."""
    made: dict[Hashable, Tensor] = {}
    reading = [part for part in missing if len(part.terms) < 2]
    if reading:
        terms = [term for part in reading for term in part.terms]
        own, crossed = (row_reading if axis == "row" else column_reading)(stored, start, rows, terms)
        crossed_values = iter(crossed)
        for part in reading:
            if not part.terms:
                made[part.key] = own
                continue
            (term,) = part.terms
            along, across = _sides(term, axis)
            lengths = _gram(across, across).diagonal()
            made[part.key] = torch.stack((next(crossed_values), _weighted(along, lengths))).float()
    for part in missing:
        if len(part.terms) == 2:
            one, other = part.terms
            first, last = _shared(rows, part.terms)
            sides = [_sides(_cut(term, first, last), axis) for term in (one, other)]
            gram = _gram(sides[0][1], sides[1][1])
            made[part.key] = _bilinear(sides[0][0], gram, sides[1][0]).float()
    return made


def _name(term: ScaledTerm) -> Hashable:
    return id(term.term.up), id(term.term.down), term.first


def _shared(rows: int, terms: Sequence[ScaledTerm]) -> tuple[int, int]:
    """The rows that all of these terms have."""
    return max((term.start for term in terms), default=0), min((term.stop for term in terms), default=rows)


def _cut(term: ScaledTerm, first: int, last: int) -> ScaledTerm:
    return ScaledTerm(first, last, term.term, term.first + first - term.start, 1.0)


def _part(scale: float | Tensor, first: int, count: int) -> float | Tensor:
    return scale.narrow(0, first, count) if isinstance(scale, Tensor) else scale


def _sides(term: ScaledTerm, axis: Axis) -> tuple[Tensor, Tensor]:
    """U and V, or Vᵀ and Uᵀ: [n, rank] along the axis, [rank, m] across it."""
    return (term.up, term.term.down) if axis == "row" else (term.term.down.T, term.up.T)


def _gram(one: Tensor, other: Tensor) -> Tensor:
    """`one · otherᵀ` in fp64: [r, s]."""
    width = max(1, CACHED_BLOCK_BYTES // (16 * max(len(one), len(other))))
    parts = zip(torch.split(one, width, 1), torch.split(other, width, 1), strict=True)
    return torch.stack([exact(left) @ exact(right).T for left, right in parts]).sum(0)


def _weighted(along: Tensor, lengths: Tensor) -> Tensor:
    """`Σᵣ along[i, r]² · lengths[r]`: [n] fp64."""
    height = max(1, CACHED_BLOCK_BYTES // (16 * along.shape[1]))
    return torch.cat([exact(part).square() @ lengths for part in torch.split(along, height)])


def _bilinear(one: Tensor, gram: Tensor, other: Tensor) -> Tensor:
    """`Σᵣₛ one[i, r] · gram[r, s] · other[i, s]`: [n] fp64."""
    height = max(1, CACHED_BLOCK_BYTES // (16 * max(gram.shape)))
    return torch.cat(
        [
            (exact(left) @ gram).mul_(exact(right)).sum(1)
            for left, right in zip(torch.split(one, height), torch.split(other, height), strict=True)
        ]
    )


def exact(values: Tensor) -> Tensor:
    """In fp64, on the CPU."""
    return values.to("cpu", torch.float64)
