"""NVFP4 and MXFP8: values of 4 and 8 bits with one scale for every 16 or 32 of a row.

    NVFP4   W0[r, c] = value(codes[r, c]) · scale[r, ⌊c / 16⌋] · tensor_scale      E2M1, E4M3, fp32
    MXFP8   W0[r, c] = codes[r, c] · 2^(scale[r, ⌊c / 32⌋] − 127)                  E4M3, E8M0

The first product is exact in fp32, so each value is rounded once at most. Codes are padded to whole blocks,
scales to whole tiles. Sources: OCP Microscaling Formats 1.0; NVIDIA cuBLAS, "Narrow precision data types"
and "1D block scaling factors layout".
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import block_count
from ..dense import single
from ..weight import StorageError, StoredWeight, flat_bytes

TILE_ROWS, TILE_BLOCKS = 128, 4
"""Rows and blocks of a row that one tile of scales covers."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the codes 0 to 7; codes 8 to 15 are their negatives."""

E8M0_BIAS, E8M0_NAN = 127, 255


@dataclass(frozen=True, slots=True, eq=False)
class BlockScaledWeight(StoredWeight):
    """codes: [≥ rows, ≥ columns in their packing]; scales: bytes of the tiles, uint8 [tiles · 512]."""

    block_size: ClassVar[int]

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return self.codes, self.scales

    def decode_rows(self, start: int, stop: int) -> Tensor:
        values = self.values(start, stop)
        blocks = values.view(stop - start, values.shape[1] // self.block_size, self.block_size)
        scale = self.row_scales(scale_rows(self.scales, blocks.shape[1], start, stop))
        return self.scaled(blocks, scale).view_as(values)[:, : self.shape[1]].contiguous()

    @abstractmethod
    def values(self, start: int, stop: int) -> Tensor:
        """The values of the codes of these rows: fp32 [stop - start, padded columns]."""

    @abstractmethod
    def row_scales(self, stored: Tensor) -> Tensor:
        """Scales in fp32 from their bytes; of the same shape."""

    def scaled(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """blocks: fp32 [rows, k, B], changed in place; scale: fp32 [rows, k]."""
        return blocks.mul_(scale[..., None])


@dataclass(frozen=True, slots=True, eq=False)
class NVFP4Weight(BlockScaledWeight):
    """codes: uint8, two values each, the earlier in the high half; tensor_scale: fp32, one element."""

    block_size: ClassVar[int] = 16

    tensor_scale: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.tensor_scale

    def values(self, start: int, stop: int) -> Tensor:
        code = torch.tensor((*E2M1, *(-value for value in E2M1)), device=self.codes.device)
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)
        pair_of_byte = pairs.view(torch.int64).flatten()  # two values as one number are found much faster
        found = pair_of_byte.index_select(0, self.codes[start:stop].flatten().int())
        return found.view(torch.float32).view(stop - start, 2 * self.codes.shape[1])

    def row_scales(self, stored: Tensor) -> Tensor:
        return single(stored.view(torch.float8_e4m3fn))

    def scaled(self, blocks: Tensor, scale: Tensor) -> Tensor:
        return blocks.mul_(scale[..., None]).mul_(self.tensor_scale.to(blocks))


@dataclass(frozen=True, slots=True, eq=False)
class MXFP8Weight(BlockScaledWeight):
    """codes: float8_e4m3fn, or float8_e5m2."""

    block_size: ClassVar[int] = 32

    def values(self, start: int, stop: int) -> Tensor:
        return single(self.codes[start:stop])

    def row_scales(self, stored: Tensor) -> Tensor:
        powers = torch.tensor([powers_of_two(exponent) for exponent in range(256)], dtype=torch.float64)
        table = powers.to(stored.device, torch.float32)
        return table.index_select(0, stored.flatten().int()).view(stored.shape)


def powers_of_two(exponent: int) -> float:
    """2^(exponent − 127); 255 stands for no number."""
    return float("nan") if exponent == E8M0_NAN else 2.0 ** (exponent - E8M0_BIAS)


def scale_rows(tiles: Tensor, blocks: int, start: int, stop: int) -> Tensor:
    """The scales of rows start:stop in order: [stop - start, blocks]; tiles: flat, one byte each.

    A tile holds 128 rows of 4 scales. That of row r and block k lies in tile (⌊r / 128⌋, ⌊k / 4⌋), at
    16 · (r mod 32) + 4 · ⌊(r mod 128) / 32⌋ + k mod 4.
    """
    across = block_count(blocks, TILE_BLOCKS)
    first, last = start // TILE_ROWS, block_count(stop, TILE_ROWS)
    touched = tiles.view(-1, across, 32, 4, TILE_BLOCKS)[first:last]
    rows = touched.permute(0, 3, 2, 1, 4).reshape((last - first) * TILE_ROWS, across * TILE_BLOCKS)
    return rows.narrow(0, start - first * TILE_ROWS, stop - start)[:, :blocks]


def tiled(scales: Tensor) -> Tensor:
    """The inverse: [rows, blocks], one byte each -> [rows, blocks] padded to whole tiles with zeros, where
    the memory is that of the tiles."""
    rows, blocks = scales.shape
    down, across = block_count(rows, TILE_ROWS), block_count(blocks, TILE_BLOCKS)
    whole = scales.new_zeros(down * TILE_ROWS, across * TILE_BLOCKS)
    whole[:rows, :blocks] = scales
    parts = whole.view(down, 4, 32, across, TILE_BLOCKS).permute(0, 3, 2, 1, 4)
    return parts.reshape(down * TILE_ROWS, across * TILE_BLOCKS)


def nvfp4_weight(shape: tuple[int, ...], codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> NVFP4Weight:
    """scales: E4M3 in tiles, any shape. Raises StorageError where they do not fit the codes or the shape."""
    check_blocks("nvfp4", shape, codes, scales, 2 * codes.shape[-1], NVFP4Weight.block_size)
    if tensor_scale.numel() != 1:
        raise StorageError(
            f"An nvfp4 weight of shape {list(shape)} has {tensor_scale.numel()} scales of the whole tensor, "
            "where it needs one; load the checkpoint again."
        )
    return NVFP4Weight(shape, "nvfp4", codes, flat_bytes(scales), tensor_scale)


def mxfp8_weight(shape: tuple[int, ...], codes: Tensor, scales: Tensor) -> MXFP8Weight:
    """scales: E8M0 in tiles, any shape. Raises StorageError where they do not fit the codes or the shape."""
    check_blocks("mxfp8", shape, codes, scales, codes.shape[-1], MXFP8Weight.block_size)
    return MXFP8Weight(shape, "mxfp8", codes, flat_bytes(scales))


def check_blocks(
    kind: str, shape: tuple[int, ...], codes: Tensor, scales: Tensor, columns: int, block_size: int
) -> None:
    """columns: with the padding. Raises StorageError."""
    rows = codes.shape[0]
    tiles = block_count(rows, TILE_ROWS) * block_count(columns // block_size, TILE_BLOCKS)
    needed = tiles * TILE_ROWS * TILE_BLOCKS
    if len(shape) != 2 or codes.dim() != 2 or rows < shape[0] or columns < shape[1] or columns % block_size:
        raise StorageError(
            f"An {kind} weight of shape {list(shape)} cannot be read from codes of shape "
            f"{list(codes.shape)} in blocks of {block_size}; load the checkpoint again."
        )
    if scales.numel() * scales.element_size() != needed:
        raise StorageError(
            f"An {kind} weight of shape {list(shape)} needs {needed} block scales in tiles of 128 rows, but "
            f"holds {scales.numel()}; load the checkpoint again."
        )
