"""One stack for all low-rank terms of a module: a single `down`, and one `up` per range of rows.

hidden = x · downᵀ · diag(scale)            y[:, rows] += hidden[:, columns] · upᵀ
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.arithmetic.factors import (
    BalancedFactors,
    HalfFactors,
    balanced_factors,
    half_factors,
)

UpBlock = tuple[tuple[int, int, int], ...]
"""What adds to one range of rows: per addition its number in the stack, and its rows [start, stop)."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The stacked factors of one module on one device, each held once.

    down: [total rank, columns]; exponents: [total rank] fp32, the powers of two that were moved out of the
    factors; columns: of each block, its part of the stack; ups: [rows, rank of the block].
    """

    down: Tensor
    exponents: Tensor
    columns: Mapping[UpBlock, slice | Tensor]
    ups: Mapping[UpBlock, Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the stack."""
        columns = [numbers for numbers in self.columns.values() if isinstance(numbers, Tensor)]
        return self.down, self.exponents, *self.ups.values(), *columns


def low_rank(steps: Sequence[object]) -> list[Add]:
    """The low-rank additions among the steps, in order; those that a stack holds."""
    return [step for step in steps if isinstance(step, Add) and isinstance(step.term, LowRank)]


def column_scales(additions: Sequence[Add]) -> Tensor:
    """The scale of each column of their stack, [total rank] fp32."""
    if len(additions) == 1:
        return torch.full((rank_of(additions[0]),), additions[0].scale, dtype=torch.float32)
    scales = [step.scale for step in additions for _ in range(rank_of(step))]
    return torch.tensor(scales, dtype=torch.float32)


def build_stack(
    additions: Sequence[Add], blocks: Iterable[UpBlock], half: bool, device: torch.device
) -> Stack | None:
    """The stack of these additions, in fp16 (`half`) or in the files' own precision; None without any.

    blocks: what its output side is multiplied by; together, each row of each addition once.
    """
    if not additions:
        return None
    factors: list[HalfFactors | BalancedFactors] = []
    for step in additions:
        if not half:
            factors.append(balanced_addition(step))  # asks for a value, of the CPU
            continue
        up, down = turned_factors(step)
        if device.type == "cuda":  # which has fp64, and is the faster one
            up, down = up.to(device), down.to(device)
        factors.append(half_factors(up, down, len(additions)))
    columns, ups = {}, {}
    for block in blocks:
        columns[block] = stack_columns([number for number, _, _ in block], additions, device)
        ups[block] = _joined([factors[number].up[start:stop] for number, start, stop in block], 1, device)
    return Stack(
        _joined([part.down for part in factors], 0, device),
        torch.cat([part.scale.to(device) for part in factors]),
        columns,
        ups,
    )


def _joined(parts: Sequence[Tensor], axis: int, device: torch.device) -> Tensor:
    """The parts on the device, side by side; a single one that lies there already is not copied."""
    placed = [part.to(device) for part in parts]
    return torch.cat(placed, axis) if len(placed) > 1 else placed[0].contiguous()


def stack_columns(numbers: Sequence[int], additions: Sequence[Add], device: torch.device) -> slice | Tensor:
    """Where those of the additions that have these numbers lie in the stack of all."""
    offsets = [0, *accumulate(map(rank_of, additions))]
    if are_neighbours(numbers):
        return slice(offsets[numbers[0]], offsets[numbers[-1] + 1])
    return torch.cat(
        [torch.arange(offsets[number], offsets[number + 1], device=device) for number in numbers]
    )


def are_neighbours(numbers: Sequence[int]) -> bool:
    """Whether they follow each other."""
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def turned_factors(step: Add) -> tuple[Tensor, Tensor]:
    """The factors of one addition with its row scale and its turns of columns: views where it has none."""
    assert isinstance(step.term, LowRank)
    up = step.term.up[step.first : step.first + step.stop - step.start]
    down = step.term.down
    if step.row_change is not None:
        up = up.float() * (1.0 + step.row_change[:, None].to(up.device))
    for operator, factor in step.columns:
        down = down.float()
        down = down + factor * operator.to(down.device).transposed(down)
    return up, down


def balanced_addition(step: Add) -> BalancedFactors:
    """`turned_factors`, balanced; those of a file, all of them, are not looked at once more."""
    assert isinstance(step.term, LowRank)
    up, down = turned_factors(step)
    whole = up.shape == step.term.up.shape and step.row_change is None and not step.columns
    return balanced_factors(up, down, step.term.sizes if whole else None)


def factor_types(steps: Sequence[object]) -> frozenset[tuple[torch.dtype, torch.dtype]]:
    """The types of up and down, of each low-rank addition, as its stack takes them."""
    return frozenset(
        (
            term.up.dtype if step.row_change is None else torch.float32,
            torch.float32 if step.columns else term.down.dtype,
        )
        for step in low_rank(steps)
        if isinstance(term := step.term, LowRank)
    )


def rank_of(step: Add) -> int:
    """Of a low-rank addition."""
    assert isinstance(step.term, LowRank)
    return step.term.rank
