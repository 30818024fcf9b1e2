"""Rounding up or down by chance, so that the mean is right."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_BITS = {torch.float8_e4m3fn: (3, -6), torch.float8_e5m2: (2, -14)}
"""Bits of the mantissa, and the exponent of the smallest normal value."""


def stochastic_rounding(value: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """By the same chances for the same seed; a type of 16 bits and more is rounded to the nearest."""
    if dtype not in LOW_BITS:
        return value.to(dtype)
    mantissa, least = LOW_BITS[dtype]
    chance = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))
    exponent = value.float().abs().clamp_min(2.0**least).log2().floor()
    step = torch.exp2(exponent - mantissa)
    largest = torch.finfo(dtype).max
    return ((value.float() / step + chance).floor() * step).clamp(-largest, largest).to(dtype)
