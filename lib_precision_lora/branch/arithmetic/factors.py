"""Low-rank factors brought into a type that its products cannot overflow.

`U · V = (U·2^b) · diag(2^−(a+b)) · (2^a·V)`: powers of two move between the factors and the scale, which
stays in fp32, and lose nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import largest_size
from lib_precision_lora.strict_product import multiply

DOWN_SUM_BOUND = 2.0**15
"""What a sum over an input of size 1 may reach: half of fp16's largest number (65504)."""

UP_SUM_BOUND = 2.0**15
"""What a whole stack's sum over hidden states of size 1 may reach."""


@dataclass(frozen=True, slots=True, eq=False)
class HalfFactors:
    """`U · V ≈ up · diag(scale) · down` with fp16 factors.

    up: [out, rank], each row's absolute sum at most UP_SUM_BOUND / stacked; down: [rank, columns], at most
    DOWN_SUM_BOUND; scale: [rank] fp32. Inputs of at most 1 in size then meet no larger sum, whatever the
    order of summation.
    """

    up: Tensor
    down: Tensor
    scale: Tensor

    def part(self, start: int, stop: int) -> HalfFactors:
        """Rows [start, stop)."""
        return HalfFactors(self.up[start:stop], self.down, self.scale)

    def product(self) -> Tensor:
        """`up · diag(scale) · down` with fp32 sums, [out, columns]."""
        return multiply(self.up.float() * self.scale, self.down.float())


def half_factors(up: Tensor, down: Tensor, stacked: int = 1) -> HalfFactors:
    """The factors in fp16, each rounded once.

    up: [out, rank], down: [rank, columns], any float type; stacked: how many such pairs share one sum.
    Each row of `down` takes a power of two of its own, `up` one for the whole. Elements more than 2^24
    below the largest of their row are lost.
    """
    row_exponents = _headroom(down.abs().sum(1, dtype=torch.float64), DOWN_SUM_BOUND)
    up_exponent = _headroom(up.abs().sum(1, dtype=torch.float64).max(), UP_SUM_BOUND / stacked)
    return HalfFactors(
        _scale_by_exponent(up, up_exponent).to(torch.float16),
        _scale_by_exponent(down, row_exponents[:, None]).to(torch.float16),
        torch.exp2(-(row_exponents + up_exponent).double()).float(),
    )


@dataclass(frozen=True, slots=True, eq=False)
class BalancedFactors:
    """`U · V = 2^exponent · up · down` in the file's own precision."""

    up: Tensor
    down: Tensor
    exponent: int

    @property
    def scale(self) -> Tensor:
        """The power of two for each rank: [rank] fp32."""
        return torch.full(self.down.shape[:1], 2.0**self.exponent, dtype=torch.float64).to(
            device=self.down.device, dtype=torch.float32
        )


MODERATE = 40
"""Factors between 2^-MODERATE and 2^MODERATE cannot leave fp32's range on their way."""


def balanced_factors(up: Tensor, down: Tensor, sizes: tuple[float, float] | None = None) -> BalancedFactors:
    """The factors as they are, or, where a bf16 or fp32 file goes to the edge of its range, balanced.

    up: [out, rank], down: [rank, columns]; sizes: their largest absolute elements, where known. Only a power
    of two for each of the two moves to the exponent, so nothing is rounded but what lies below fp32's normal
    range beside the largest element.
    """
    up_size, down_size = (largest_size(up), largest_size(down)) if sizes is None else sizes
    exponents = _extreme_exponent(up_size), _extreme_exponent(down_size)
    if exponents == (0, 0):
        return BalancedFactors(up, down, 0)
    up, down = (
        torch.ldexp(factor.float(), torch.tensor(-exponent))
        for factor, exponent in zip((up, down), exponents, strict=True)
    )
    return BalancedFactors(up, down, sum(exponents))


def _extreme_exponent(size: float) -> int:
    """The e for which 2^-e brings the largest element to between 1/2 and 1, if it is far from there; else
    0."""
    exponent = math.frexp(size)[1]
    return 0 if abs(exponent) <= MODERATE else exponent


def _headroom(sums: Tensor, bound: float) -> Tensor:
    """The largest integer e with `sums · 2^e ≤ bound`; 0 where the sum is 0. sums: float64."""
    exponents = torch.floor(torch.log2(bound / sums.clamp_min(1e-300)))
    return torch.where(sums > 0, exponents, torch.zeros_like(exponents))


def _scale_by_exponent(factor: Tensor, exponent: Tensor) -> Tensor:
    return (factor.double() * torch.exp2(exponent)).float()
