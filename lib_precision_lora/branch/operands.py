"""What a branch multiplies: one module's effective weight and bias, made ready for one device and type."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import Hadamard, Kronecker, LowRank
from lib_precision_lora.branch.effective import EffectiveWeight, Piece
from lib_precision_lora.branch.identity import structure
from lib_precision_lora.branch.product import Compute, Product, choose_product
from lib_precision_lora.branch.stack import Stack, build_stack, column_scales, low_rank
from lib_precision_lora.branch.vector import DeltaVector
from lib_precision_lora.branch.wide_input import WideInput


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

    plain: nothing but additions, so that the base output stays where it is and is added to.
    """

    product: Product
    stack: Stack | None
    scale: Tensor | None
    phases: tuple[Phase, ...]
    pieces: tuple[Piece, ...]
    bias: Tensor | None
    plain: bool


class WeightBranch:
    """What the branches of linear, conv and embedding modules share.

    Makes `Operands` when an input first shows its device and type, and keeps the last ones. The strengths
    live outside of the stack, so that `restrength` leaves the factors where they are.
    """

    def __init__(self, weight: EffectiveWeight, bias: EffectiveWeight | None, compute: Compute) -> None:
        self.compute = compute
        self.shape = weight.stored.shape
        self.wide_input = WideInput.of(weight.stored)
        self.steps, self.pieces = weight.steps, weight.pieces
        self.bias = None if bias is None else DeltaVector(bias)
        self._operands: Operands | None = None
        self._made_for: tuple[torch.device, bool] | None = None

    def structure(self) -> tuple[object, ...]:
        """Equal for two branches that differ in strengths only."""
        return (
            type(self),
            self.compute,
            self.bias is None,
            structure(self.pieces, self.steps),
        )

    def restrength(self, other: WeightBranch) -> None:
        """Take the strengths of a branch of equal structure; the factors stay where they are."""
        self.steps, self.pieces, self.bias = other.steps, other.pieces, other.bias
        if self._operands is not None and self._made_for is not None:
            self._operands = self._assemble(self._operands.product, self._operands.stack, self._made_for[0])

    def operands(self, x: Tensor) -> Operands:
        """The operands for this input: made at the first forward, then found."""
        product = choose_product(self.compute, x.device, x.dtype)
        made_for = (x.device, product.half)
        if self._operands is None or self._made_for != made_for:
            self._operands = None
            stack = build_stack(low_rank(self.steps), product.half, x.device)
            self._operands = self._assemble(product, stack, x.device)
            self._made_for = made_for
        return self._operands

    def release(self) -> None:
        """Let go of everything that was made for a device."""
        self._operands = self._made_for = None
        if self.bias is not None:
            self.bias.release()

    def _assemble(self, product: Product, stack: Stack | None, device: torch.device) -> Operands:
        scale = None
        if stack is not None:
            scale = column_scales(low_rank(self.steps)).to(device) * stack.exponents
        turned = any(piece.turns for piece in self.pieces)
        pieces = tuple(
            dataclasses.replace(piece, turns=tuple((op.to(device), f) for op, f in piece.turns))
            for piece in self.pieces
        )
        phases = tuple(_phases(self.steps, stack, self.shape[0], device))
        plain = not turned and len(phases) == 1 and not phases[0].lefts
        bias = None if self.bias is None else self.bias.on(device)
        return Operands(product, stack, scale, phases, pieces, bias, plain)


def _phases(steps: Sequence[Add | Left], stack: Stack | None, rows: int, device: torch.device) -> list[Phase]:
    """The steps as phases: each begins with turns of outputs (the first may have none)."""
    groups: list[tuple[list[Left], list[Add]]] = [([], [])]
    for step in steps:
        if isinstance(step, Add):
            groups[-1][1].append(step)
            continue
        if groups[-1][1]:
            groups.append(([], []))
        groups[-1][0].append(dataclasses.replace(step, operator=step.operator.to(device)))
    numbers = {id(step): number for number, step in enumerate(low_rank(steps))}
    return [
        Phase(tuple(lefts), tuple(_ranges(additions, stack, numbers, rows, device)))
        for lefts, additions in groups
    ]


def _ranges(
    additions: Sequence[Add],
    stack: Stack | None,
    numbers: dict[int, int],
    rows: int,
    device: torch.device,
) -> list[RowRange]:
    """Disjoint row ranges that cover all rows, each with what is added there."""
    edges = sorted({0, rows, *(step.start for step in additions), *(step.stop for step in additions)})
    ranges = []
    for start, stop in pairwise(edges):
        here = [step for step in additions if step.start <= start and stop <= step.stop]
        stacked = [step for step in here if isinstance(step.term, LowRank)]
        columns, up = None, None
        if stacked and stack is not None:
            columns, up = stack.up(
                [numbers[id(step)] for step in stacked],
                [(start - step.start, stop - step.start) for step in stacked],
            )
        others = tuple(_placed(step, device) for step in here if not isinstance(step.term, LowRank))
        ranges.append(RowRange(start, stop, columns, up, others))
    return ranges


def _placed(step: Add, device: torch.device) -> Add:
    """The addition with its factors on the device; a dense remainder stays where it is and is streamed."""
    term = step.term
    if isinstance(term, Kronecker):
        term = Kronecker(term.left.to(device), tuple(factor.to(device) for factor in term.right))
    elif isinstance(term, Hadamard):
        term = Hadamard(*(factor.to(device) for factor in term.tensors()))
    return dataclasses.replace(
        step,
        term=term,
        row_change=None if step.row_change is None else step.row_change.to(device),
        columns=tuple((operator.to(device), factor) for operator, factor in step.columns),
    )
