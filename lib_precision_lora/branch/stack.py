"""One stack for all low-rank terms of a module: a single `down`, and one `up` per row segment.

y[:, segment] += (x · downᵀ · diag(scale))[:, columns] · upᵀ
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.terms import LowRank, Segment
from lib_precision_lora.branch.factors import BalancedFactors, HalfFactors, balanced_factors, half_factors

ColumnKey = tuple[int, int, int, float]


@dataclass(frozen=True, slots=True, eq=False)
class StackLayout:
    """Which term stands in which columns of the stack, per segment; no tensor is touched for it.

    blocks: the distinct terms in the order of their columns; columns: for each segment, the indices of its
    blocks. A term that several segments share (a LoRA on the whole of a fused weight) stands there once.
    """

    blocks: tuple[LowRank, ...]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> StackLayout:
        blocks: dict[ColumnKey, tuple[int, LowRank]] = {}
        columns = []
        for segment in segments:
            seen: dict[tuple[int, int, float], int] = {}
            indices = []
            for term in segment.terms:
                tensors = (id(term.up), id(term.down), term.scale)
                seen[tensors] = seen.get(tensors, -1) + 1
                key = (id(term.up), id(term.down), seen[tensors], term.scale)
                indices.append(blocks.setdefault(key, (len(blocks), term))[0])
            columns.append(tuple(indices))
        return cls(tuple(term for _, term in blocks.values()), tuple(columns))

    def structure(self) -> tuple[object, ...]:
        """What a change of strength leaves alone: equal structures differ in scales only."""
        return tuple((id(term.up), id(term.down)) for term in self.blocks), self.columns

    def scales(self) -> Tensor:
        """The scale of each column, [total rank] fp32."""
        return torch.cat(
            [torch.full((term.rank,), term.scale, dtype=torch.float32) for term in self.blocks]
            or [torch.empty(0)]
        )


@dataclass(frozen=True, slots=True, eq=False)
class SegmentUp:
    """The up factors of one segment: columns (a slice where they are neighbours) and up: [rows, rank]."""

    columns: slice | Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The stacked factors of one module on one device.

    down: [total rank, columns]; ups: one per segment, None for a segment without terms;
    exponents: [total rank] fp32, the powers of two that were moved out of the factors.
    """

    down: Tensor
    ups: tuple[SegmentUp | None, ...]
    exponents: Tensor

    @property
    def nbytes(self) -> int:
        ups = [segment.up for segment in self.ups if segment is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.down, self.exponents, *ups))


def build_stack(
    layout: StackLayout, segments: Sequence[Segment], half: bool, device: torch.device
) -> Stack | None:
    """The stack of a layout, in fp16 (`half`) or in the files' own precision; None without terms."""
    if not layout.blocks:
        return None
    prepared: list[HalfFactors | BalancedFactors] = [
        half_factors(term.up, term.down, len(layout.blocks)) if half else balanced_factors(term.up, term.down)
        for term in layout.blocks
    ]
    offsets = [0]
    for term in layout.blocks:
        offsets.append(offsets[-1] + term.rank)
    ups: list[SegmentUp | None] = []
    for segment, indices in zip(segments, layout.columns, strict=True):
        if not indices:
            ups.append(None)
            continue
        height = segment.stop - segment.start
        parts = [
            prepared[index].up[term.first : term.first + height]
            for index, term in zip(indices, segment.terms, strict=True)
        ]
        up = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        ups.append(SegmentUp(_columns(indices, offsets, device), up.contiguous().to(device)))
    down = torch.cat([factors.down for factors in prepared]) if len(prepared) > 1 else prepared[0].down
    exponents = torch.cat([factors.scale for factors in prepared])
    return Stack(down.to(device), tuple(ups), exponents.to(device))


def _columns(indices: Sequence[int], offsets: Sequence[int], device: torch.device) -> slice | Tensor:
    """The columns of these blocks: a slice where they are neighbours in order, else their numbers."""
    if list(indices) == list(range(indices[0], indices[0] + len(indices))):
        return slice(offsets[indices[0]], offsets[indices[-1] + 1])
    numbers = [torch.arange(offsets[index], offsets[index + 1]) for index in indices]
    return torch.cat(numbers).to(device)
