"""What a branch multiplies, made ready for one device and type: phases of turns and additions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.algebra.effective import Piece
from lib_precision_lora.branch.arithmetic.device_copies import DeviceCopies
from lib_precision_lora.branch.arithmetic.product import Product
from lib_precision_lora.branch.arithmetic.stack import (
    Stack,
    UpBlock,
    low_rank,
)
from lib_precision_lora.branch.forward.turned_input import (
    InputTurns,
)


@dataclass(frozen=True, slots=True, eq=False)
class RowRange:
    """Rows [start, stop) of one phase: their part of the stack, and the additions that are not low-rank."""

    start: int
    stop: int
    columns: slice | Tensor | None
    up: Tensor | None
    others: tuple[Add, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Phase:
    """Turns of outputs, one after the other, then everything that is added before the next turn."""

    lefts: tuple[Left, ...]
    ranges: tuple[RowRange, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The phases of one module on one device, for one arithmetic.

    down: [total rank, columns] and scale: [total rank] fp32, of all low-rank additions; None without any.
    plain: nothing but additions, so that the base output stays where it is and is added to; token_bytes:
    what one token takes in the forward of a linear module; at_once: how many it treats, at most. before:
    what turns the module's input, where that is not left to a second pass.
    """

    product: Product
    down: Tensor | None
    scale: Tensor | None
    phases: tuple[Phase, ...]
    pieces: tuple[Piece, ...]
    bias: Tensor | None
    plain: bool
    token_bytes: int
    at_once: int
    before: InputTurns | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is added to the module's output."""
        ranges = self.phases[0].ranges
        added = any(each.up is not None or each.others for each in ranges)
        return self.plain and self.bias is None and not added

    @property
    def has_whole_terms(self) -> bool:
        """Whether something is added that is not of low rank."""
        return any(row_range.others for phase in self.phases for row_range in phase.ranges)


def up_blocks(steps: Sequence[Add | Left], rows: int) -> list[UpBlock]:
    """What the output side of a stack is cut into: one block per range of rows of each phase."""
    numbers = _numbers(steps)
    blocks = [
        _up_block(additions, start, stop, numbers)
        for _, additions in _grouped(steps)
        for start, stop in _row_ranges(additions, rows)
    ]
    return [block for block in blocks if block]


def is_plain(steps: Sequence[Add | Left], pieces: Sequence[Piece]) -> bool:
    """Whether low-rank terms are added, and nothing else is done."""
    turned = any(piece.turns for piece in pieces)
    return bool(steps) and not turned and len(low_rank(steps)) == len(steps)


def factor_bytes(steps: Sequence[Add | Left]) -> int:
    """Bytes of the factors as the files have them."""
    tensors = {id(t): t for step in steps if isinstance(step, Add) for t in step.term.tensors()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _grouped(steps: Sequence[Add | Left]) -> list[tuple[list[Left], list[Add]]]:
    """The steps as phases: each begins with turns of outputs (the first may have none)."""
    groups: list[tuple[list[Left], list[Add]]] = [([], [])]
    for step in steps:
        if isinstance(step, Add):
            groups[-1][1].append(step)
            continue
        if groups[-1][1]:
            groups.append(([], []))
        groups[-1][0].append(step)
    return groups


def phases_of(
    steps: Sequence[Add | Left], stack: Stack | None, rows: int, copies: DeviceCopies
) -> list[Phase]:
    numbers = _numbers(steps)
    return [
        Phase(
            tuple(dataclasses.replace(left, operator=copies.operator(left.operator)) for left in lefts),
            tuple(_ranges(additions, stack, numbers, rows, copies)),
        )
        for lefts, additions in _grouped(steps)
    ]


def _ranges(
    additions: Sequence[Add],
    stack: Stack | None,
    numbers: Mapping[int, int],
    rows: int,
    copies: DeviceCopies,
) -> list[RowRange]:
    """Disjoint row ranges that cover all rows, each with what is added there."""
    ranges = []
    for start, stop in _row_ranges(additions, rows):
        block = _up_block(additions, start, stop, numbers)
        columns, up = None, None
        if block and stack is not None:
            columns, up = stack.columns[block], stack.ups[block]
        others = tuple(
            copies.addition(step)
            for step in additions
            if step.start <= start and stop <= step.stop and not isinstance(step.term, LowRank)
        )
        ranges.append(RowRange(start, stop, columns, up, others))
    return ranges


def _row_ranges(additions: Sequence[Add], rows: int) -> list[tuple[int, int]]:
    """All rows, cut where an addition begins or ends."""
    edges = {0, rows, *(step.start for step in additions), *(step.stop for step in additions)}
    return list(pairwise(sorted(edges)))


def _up_block(additions: Sequence[Add], start: int, stop: int, numbers: Mapping[int, int]) -> UpBlock:
    """The low-rank additions to these rows."""
    return tuple(
        (numbers[id(step)], start - step.start, stop - step.start)
        for step in additions
        if step.start <= start and stop <= step.stop and isinstance(step.term, LowRank)
    )


def _numbers(steps: Sequence[Add | Left]) -> Mapping[int, int]:
    """The place of each low-rank addition in the stack."""
    return {id(step): number for number, step in enumerate(low_rank(steps))}
