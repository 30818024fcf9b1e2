"""Forge's baked layout, written once more from its description: the oracle of the baked tests.

It goes value by value through natural-order codes, and never through the code under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Baked:
    """data: the baked bytes [n, block_bytes]; values: fp32 [n, block_size], what they mean."""

    data: Tensor
    values: Tensor


def halves(blocks: npt.NDArray[np.uint8], at: int) -> Tensor:
    """The fp16 field at a byte offset of every block: [n, 1]."""
    return torch.from_numpy(blocks[:, at : at + 2].copy()).view(torch.float16)


def natural_codes(packed: npt.NDArray[np.uint8], run: int) -> npt.NDArray[np.uint8]:
    """Standard order -> value order: every `run` bytes hold `run` low nibbles, then `run` high ones."""
    runs = packed.reshape(len(packed), -1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def paired(codes: npt.NDArray[np.uint8]) -> Tensor:
    """Value order -> baked order: neighbours share a byte, the earlier one in the low nibble."""
    return torch.from_numpy(codes[:, 0::2] + 16 * codes[:, 1::2])


def sub_scales(packed: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Q4_K's twelve bytes -> eight 6-bit scales and eight 6-bit minima, each [n, 8]."""
    scale = np.empty((len(packed), 8), dtype=np.uint8)
    minimum = np.empty_like(scale)
    for j in range(4):
        scale[:, j] = packed[:, j] % 64
        minimum[:, j] = packed[:, j + 4] % 64
        scale[:, j + 4] = packed[:, j + 8] % 16 + 16 * (packed[:, j] // 64)
        minimum[:, j + 4] = packed[:, j + 8] // 16 + 16 * (packed[:, j + 4] // 64)
    return torch.from_numpy(scale), torch.from_numpy(minimum)


def as_bytes(*fields: Tensor) -> Tensor:
    return torch.cat([field.contiguous().view(torch.uint8) for field in fields], dim=1)


def bake(blocks: npt.NDArray[np.uint8], name: str, compute: torch.dtype) -> Baked:
    """Standard blocks uint8 [n, block_bytes] of Q8_0, Q4_0, Q4_1 or Q4_K, baked for a compute type."""
    if name == "Q4_K":
        return bake_q4_k(blocks, compute)
    scale = halves(blocks, 0).to(compute)
    if name == "Q8_0":
        quants = torch.from_numpy(blocks[:, 2:].copy()).view(torch.int8)
        return Baked(as_bytes(scale, quants).view(torch.int8), quants.float() * scale.float())
    if name == "Q4_0":
        codes = natural_codes(blocks[:, 2:], 16)
        return Baked(as_bytes(scale, paired(codes)), (torch.from_numpy(codes).float() - 8) * scale.float())
    minimum = halves(blocks, 2).to(compute)
    codes = natural_codes(blocks[:, 4:], 16)
    values = torch.from_numpy(codes).float() * scale.float() + minimum.float()
    return Baked(as_bytes(scale, minimum, paired(codes)), values)


def bake_q4_k(blocks: npt.NDArray[np.uint8], compute: torch.dtype) -> Baked:
    scale_codes, minimum_codes = sub_scales(blocks[:, 4:16])
    scale = halves(blocks, 0).to(compute) * scale_codes
    minimum = halves(blocks, 2).to(compute) * minimum_codes
    codes = natural_codes(blocks[:, 16:], 32)
    quants = torch.from_numpy(codes).float().view(-1, 8, 32)
    values = quants * scale.float().unsqueeze(2) - minimum.float().unsqueeze(2)
    return Baked(as_bytes(scale, minimum, paired(codes)), values.view(-1, 256))
