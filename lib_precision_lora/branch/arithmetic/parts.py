"""A factor as a sum of numbers of a narrower type.

t ≈ p₀ + p₁        p₀ = t rounded to the type, p₁ = t − p₀ rounded; in bf16 |t − p₀ − p₁| ≤ 2⁻¹⁶ |t|
"""

from __future__ import annotations

import torch
from torch import Tensor


def part_count(source: torch.dtype, target: torch.dtype) -> int:
    """Parts of the target type that hold a factor of the source type to law 2's fp16 figure (1e-3).

    One rounding to fp16 or fp32 keeps it; one to bf16, of 8 bits, does not.
    """
    return 2 if target == torch.bfloat16 and source != target else 1


def in_parts(values: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """The values as one or two parts, [count, …]; a view where they are one part already."""
    first = values.to(dtype)
    if count == 1:
        return first[None]
    return torch.stack((first, (values.float() - first.float()).to(dtype)))
