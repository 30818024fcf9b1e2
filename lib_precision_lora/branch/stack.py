"""One stack for all low-rank terms of a module: a single `down`, and one `up` per range of rows.

hidden = x · downᵀ · diag(scale)            y[:, rows] += hidden[:, columns] · upᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.factors import BalancedFactors, HalfFactors, balanced_factors, half_factors


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The stacked factors of one module on one device.

    down: [total rank, columns]; exponents: [total rank] fp32, the powers of two that were moved out of the
    factors; ups: per low-rank addition, [rows, rank]; offsets: its first column in the stack.
    """

    down: Tensor
    exponents: Tensor
    ups: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    _joined: dict[tuple[object, ...], tuple[slice | Tensor, Tensor]] = field(default_factory=dict)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor of the stack."""
        return self.down, self.exponents, *self.ups, *(up for _, up in self._joined.values())

    def up(self, indices: Sequence[int], rows: Sequence[tuple[int, int]]) -> tuple[slice | Tensor, Tensor]:
        """The columns and the joined up factor of some additions: rows [start, stop) of each of them.

        Joined once: a change of strength asks for the same again.
        """
        key = tuple(indices), tuple(rows)
        if key not in self._joined:
            self._joined[key] = self._join(indices, rows)
        return self._joined[key]

    def _join(self, indices: Sequence[int], rows: Sequence[tuple[int, int]]) -> tuple[slice | Tensor, Tensor]:
        parts = [self.ups[index][start:stop] for index, (start, stop) in zip(indices, rows, strict=True)]
        up = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        ranks = [self.ups[index].shape[1] for index in indices]
        if list(indices) == list(range(indices[0], indices[0] + len(indices))):
            first = self.offsets[indices[0]]
            return slice(first, first + sum(ranks)), up
        numbers = [
            torch.arange(self.offsets[index], self.offsets[index] + rank, device=up.device)
            for index, rank in zip(indices, ranks, strict=True)
        ]
        return torch.cat(numbers), up


def low_rank(steps: Sequence[object]) -> list[Add]:
    """The low-rank additions among the steps, in order; those that a stack holds."""
    return [step for step in steps if isinstance(step, Add) and isinstance(step.term, LowRank)]


def column_scales(additions: Sequence[Add]) -> Tensor:
    """The scale of each column of their stack, [total rank] fp32."""
    return torch.cat([torch.full((_rank(step),), step.scale, dtype=torch.float32) for step in additions])


def build_stack(additions: Sequence[Add], half: bool, device: torch.device) -> Stack | None:
    """The stack of these additions, in fp16 (`half`) or in the files' own precision; None without any."""
    if not additions:
        return None
    factors: list[HalfFactors | BalancedFactors] = []
    for step in additions:
        up, down = _turned_factors(step)
        factors.append(half_factors(up, down, len(additions)) if half else balanced_factors(up, down))
    offsets = [0]
    for step in additions[:-1]:
        offsets.append(offsets[-1] + _rank(step))
    downs = [part.down.to(device) for part in factors]
    return Stack(
        torch.cat(downs) if len(downs) > 1 else downs[0],
        torch.cat([part.scale.to(device) for part in factors]),
        tuple(part.up.contiguous().to(device) for part in factors),
        tuple(offsets),
    )


def _turned_factors(step: Add) -> tuple[Tensor, Tensor]:
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


def _rank(step: Add) -> int:
    assert isinstance(step.term, LowRank)
    return step.term.rank
