"""The effective weight: what a stack of adapters makes of one stored weight, without writing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import Adapter, AdapterError, require_number
from lib_precision_lora.adapters.operators import Uniform
from lib_precision_lora.adapters.steps import Add, Left, Right, Step, Turn
from lib_precision_lora.branch.algebra.identity import exact_identity
from lib_precision_lora.branch.algebra.low_rank_form import LowRankForm, low_rank_form
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.branch.algebra.norms import Axis, squares
from lib_precision_lora.branch.algebra.number_range import Factors, bound_of, require_range
from lib_precision_lora.branch.algebra.reading import Reader
from lib_precision_lora.storage import StoredWeight


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows [start, stop) of the base: `diag(share) · W0 · Π (I + f·dN)`, turns in the order of the product.

    share: [stop − start] fp32, 1 where None. The shares of all pieces of a row add up to 1.
    """

    start: int
    stop: int
    turns: tuple[Turn, ...] = ()
    share: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class EffectiveWeight:
    """`W_eff = stepₖ ∘ … ∘ step₁ (W0 · R)`, R by rows; `lib_precision_lora.adapters.steps` has the steps.

    R is a product of turns, for some rows a mixture of several (`Piece.share`).

    The form is closed under `apply`, so a whole stack, in prompt order, is one such value. It refers to
    the tensors of the adapters and of the stored weight, and copies neither.
    """

    stored: StoredWeight
    pieces: tuple[Piece, ...]
    steps: tuple[Add | Left, ...] = ()
    memo: Memo = field(default_factory=Memo)
    name: str = ""

    @classmethod
    def identity(cls, stored: StoredWeight, memo: Memo | None = None, name: str = "") -> EffectiveWeight:
        """`W_eff = W0`. memo, name: where norms and products are kept from one stack to the next."""
        return cls(stored, (Piece(0, stored.shape[0]),), (), memo or Memo(), name)

    @property
    def is_identity(self) -> bool:
        return not self.steps and not any(piece.turns for piece in self.pieces)

    def apply(
        self, adapter: Adapter, strength: float = 1.0, rows: tuple[int, int] | None = None
    ) -> EffectiveWeight:
        """`W + strength · (A(W) − W)` on the running weight.

        rows: (start, length) of the part that the adapter concerns; all rows where None.
        Raises `AdapterError` where the adapter does not fit, or a number is not finite.
        """
        start, length = self._range(rows)
        require_number("the strength", strength)
        adapter.check((length, *self.stored.shape[1:]))
        result = self
        for step in adapter.compose(self.running(start, length), strength):
            require_range(step, self.largest)
            if start:
                step = dataclasses.replace(step, start=step.start + start, stop=step.stop + start)
            result = result.then(step)
        return result

    def largest(self, factors: Factors) -> float:
        """A bound of the elements of a term or an operator."""
        return bound_of(self.memo, factors)

    def running(self, start: int, length: int) -> RunningRows:
        """What an adapter for these rows sees of the weight."""
        return RunningRows(self, start, length)

    def scaled(self, factor: float, rows: tuple[int, int] | None = None) -> EffectiveWeight:
        """`factor · W_eff`, on these rows: (start, length), all where None.

        Raises `AdapterError` where the rows are not there, or the factor is not finite.
        """
        start, length = self._range(rows)
        require_number("the base weight's factor", factor)
        return self.then(Left(start, start + length, Uniform(factor - 1.0)))

    def _range(self, rows: tuple[int, int] | None) -> tuple[int, int]:
        """(start, length) of the rows meant. Raises `AdapterError` where the weight does not have them."""
        start, length = rows if rows is not None else (0, self.stored.shape[0])
        if not 0 <= start < start + length <= self.stored.shape[0]:
            raise AdapterError(
                f"rows {start} to {start + length} of a weight that has {self.stored.shape[0]}"
            )
        return start, length

    def then(self, step: Step) -> EffectiveWeight:
        """This weight after one more step, its rows counted from the first of the weight."""
        if not isinstance(step, Right):
            return dataclasses.replace(self, steps=(*self.steps, step))
        pieces = [
            turned
            for piece in self.pieces
            for part, inside in _cut(piece, step.start, step.stop)
            for turned in (_turned_piece(part, step) if inside else (part,))
        ]
        steps: list[Add | Left] = []
        for earlier in self.steps:
            if isinstance(earlier, Left):
                _refuse_part_of_rotation(earlier, step)
                steps.append(earlier)
                continue
            for addition, inside in _cut(earlier, step.start, step.stop):
                steps.extend(_turned_addition(addition, step) if inside else (addition,))
        return dataclasses.replace(self, pieces=tuple(pieces), steps=tuple(steps))

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`W_eff − W0`, materialized; for tests, reports and vectors (never in a forward).

        dtype: the arithmetic of the products. float16 is that of the branch's fp16 mode, fp16 products
        with fp32 sums. The result is float32, or float64 for float64.
        """
        return Reader(self.stored, self.pieces, self.steps, dtype).delta().reshape(self.stored.shape)


@dataclass(frozen=True, slots=True, eq=False)
class RunningRows:
    """What an adapter sees of a running weight (`steps.Running`): rows [start, start + length)."""

    weight: EffectiveWeight
    start: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length, *self.weight.stored.shape[1:])

    def row_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        return self._squares("row", additions)

    def column_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        return self._squares("column", additions)

    def _squares(self, axis: Axis, additions: Sequence[Add]) -> Tensor:
        """In closed form; what that leaves unsure, and what has none, by reading all of the weight."""
        weight, start, stop = self.weight, self.start, self.start + self.length
        reader, form = self._reader(additions, torch.float64), self._form(axis, additions)
        if form is not None:
            place = weight.name, start, stop
            base = *place, fingerprint(weight.stored)
            found, sure = squares(form, axis, weight.stored, start, weight.memo, place, base)
            if sure.all():
                return found
            if axis == "row":
                unsure = (~sure).nonzero()
                first, last = int(unsure[0]), int(unsure[-1]) + 1
                found[first:last] = reader.row_squares(start + first, start + last)
                return found
        return reader.row_squares(start, stop) if axis == "row" else reader.column_squares(start, stop)

    def _form(self, axis: Axis, additions: Sequence[Add]) -> LowRankForm | None:
        """The closed form of these rows, None where the norms along this axis have none."""
        steps = (*self.weight.steps, *self._shifted(additions))
        form = low_rank_form(self.weight.pieces, steps, self.start, self.start + self.length)
        return form if form is not None and (axis == "row" or form.is_uniform) else None

    def times(self, matrix: Tensor) -> Tensor:
        return self._reader((), torch.float32).times(self.start, self.start + self.length, matrix)

    def remember(self, adapter: object, make: Callable[[], Tensor]) -> Tensor:
        weight = self.weight
        state = exact_identity(weight.pieces, weight.steps)
        key = weight.name, fingerprint(weight.stored), self.start, self.length, id(adapter), state
        return weight.memo.recall(key, (adapter, weight.pieces, weight.steps), make)

    def _reader(self, additions: Sequence[Add], dtype: torch.dtype) -> Reader:
        """dtype: fp64 for norms, whose ratio to a magnitude is so near to 1 that fp32 would lose it."""
        steps = (*self.weight.steps, *self._shifted(additions))
        return Reader(self.weight.stored, self.weight.pieces, steps, dtype)

    def _shifted(self, additions: Sequence[Add]) -> list[Add]:
        """With their rows counted from the first of the weight."""
        return [
            dataclasses.replace(step, start=step.start + self.start, stop=step.stop + self.start)
            for step in additions
        ]


def fingerprint(stored: StoredWeight) -> tuple[object, ...]:
    """What tells one base from another under the same name: kind, shape, and what three rows hold.

    Identity would not do: a host makes new objects of the same weight, and may write another into one.
    """
    last = stored.shape[0] - 1
    rows = torch.cat([stored.sample(row).flatten() for row in (0, last // 2, last)]).cpu().double()
    return stored.kind, stored.shape, *rows.view(3, -1).sum(1).tolist()


Cuttable = TypeVar("Cuttable", Piece, Add)


def _cut(part: Cuttable, start: int, stop: int) -> Iterator[tuple[Cuttable, bool]]:
    """The part, cut at these rows; with each piece whether it lies between them."""
    edges = sorted({part.start, part.stop, *(row for row in (start, stop) if part.start < row < part.stop)})
    for low, high in pairwise(edges):
        yield _rows_of(part, low, high), start <= low and high <= stop


def _rows_of(part: Cuttable, low: int, high: int) -> Cuttable:
    shift = low - part.start
    here = slice(shift, shift + high - low)
    if isinstance(part, Piece):
        share = None if part.share is None else part.share[here]
        return dataclasses.replace(part, start=low, stop=high, share=share)
    row_change = None if part.row_change is None else part.row_change[here]
    return dataclasses.replace(part, start=low, stop=high, first=part.first + shift, row_change=row_change)


def _turned_piece(piece: Piece, step: Right) -> tuple[Piece, ...]:
    """The piece after a turn of its inputs; with shares, one that is turned and one that is not."""
    turns = (*piece.turns, (step.operator, step.factor))
    share = _share_of(step, piece.start, piece.stop)
    if share is None:
        return (dataclasses.replace(piece, turns=turns),)
    whole = torch.ones_like(share) if piece.share is None else piece.share
    return (
        dataclasses.replace(piece, share=whole * (1.0 - share)),
        dataclasses.replace(piece, turns=turns, share=whole * share),
    )


def _turned_addition(addition: Add, step: Right) -> tuple[Add, ...]:
    """The addition after a turn of its inputs; with shares, one that is turned and one that is not."""
    columns = (*addition.columns, (step.operator, step.factor))
    share = _share_of(step, addition.start, addition.stop)
    if share is None:
        return (dataclasses.replace(addition, columns=columns),)
    whole = torch.ones_like(share) if addition.row_change is None else 1.0 + addition.row_change.to(share)
    return (
        dataclasses.replace(addition, row_change=whole * (1.0 - share) - 1.0),
        dataclasses.replace(addition, columns=columns, row_change=whole * share - 1.0),
    )


def _share_of(step: Right, start: int, stop: int) -> Tensor | None:
    return None if step.share is None else step.share[start - step.start : stop - step.start]


def _refuse_part_of_rotation(earlier: Left, step: Right) -> None:
    """A turn of inputs that differs among rows which were rotated together has no exact form here."""
    apart = step.stop <= earlier.start or earlier.stop <= step.start
    whole = step.start <= earlier.start and earlier.stop <= step.stop
    if not earlier.operator.mixes or apart:
        return
    if not whole:
        raise AdapterError("it turns the inputs of a part of a layer that another adapter rotates as a whole")
    if step.share is not None:
        raise AdapterError(
            "it turns inputs by rows, at a strength other than 1, of a layer whose outputs another adapter "
            "rotates as a whole; put it before that one in the prompt, or set its strength to 1"
        )
