"""Forge Neo's `ParameterNF4` (2.29 and later): bitsandbytes' 4-bit weight in one buffer, without the package.

    bytes     codes | absmax                     fp32, one per block
    nested    codes | packed absmax | scales     uint8, one per block; fp32
    attributes: real_shape, blocksize, code (fp32 [16]), packed_bytes (of the codes), quant_type, and
                nested: None, or code (fp32 [256]), blocksize, offset, absmax_bytes

Each part of fp32 begins at a multiple of 4 bytes. Source: the layout in Haoming02/sd-webui-forge-classic,
`backend/operations_nf4.py`, 39df7f1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import block_count
from .bnb4 import FourBitWeight, NestedStatistics, PlainStatistics
from .weight import StorageError, StoredWeight, flat_bytes, plain

FP32 = 4
Statistics = NestedStatistics | PlainStatistics


@dataclass(frozen=True, slots=True, eq=False)
class OneBufferWeight(FourBitWeight):
    """A 4-bit weight and its statistics in one buffer; buffer: uint8 [all bytes]."""

    buffer: Tensor

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()


def nf4_parameter_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises `packed_bytes` with `real_shape`; raises StorageError where the buffer is too small."""
    packed_bytes, real_shape = (getattr(parameter, name, None) for name in ("packed_bytes", "real_shape"))
    if packed_bytes is None or real_shape is None:
        return None
    owner: Any = parameter
    shape, buffer = tuple(int(size) for size in real_shape), flat_bytes(parameter)
    block_size = int(owner.blocksize)
    blocks = block_count(prod(shape), block_size)
    begin = aligned(int(packed_bytes))
    needed = begin + statistics_bytes(blocks, owner.nested)
    kind = f"bnb-{getattr(parameter, 'quant_type', 'nf4')}"
    if 2 * packed_bytes < prod(shape) or buffer.numel() < needed or block_size % 2:
        raise StorageError(
            f"A {kind} weight of shape {list(shape)} in one buffer needs {block_count(prod(shape), 2)} bytes "
            f"of codes and {needed} in all, in blocks of {block_size}, but holds {packed_bytes} and "
            f"{buffer.numel()}; load the checkpoint again."
        )
    return OneBufferWeight(
        shape=shape,
        kind=kind,
        block_size=block_size,
        packed=buffer[: int(packed_bytes)],
        code=plain(owner.code).to(buffer.device, torch.float32),
        statistics=statistics(buffer[begin:], blocks, owner.nested),
        buffer=buffer,
    )


def statistics(stored: Tensor, blocks: int, nested: Mapping[str, Any] | None) -> Statistics:
    """stored: uint8, the buffer behind the codes."""
    if nested is None:
        return PlainStatistics(stored[: FP32 * blocks].view(torch.float32))
    inner = int(nested["blocksize"])
    begin = aligned(blocks)
    return NestedStatistics(
        packed=stored[:blocks],
        code=plain(nested["code"]).to(stored.device, torch.float32),
        scale=stored[begin : begin + FP32 * block_count(blocks, inner)].view(torch.float32),
        offset=torch.tensor(float(nested["offset"]), device=stored.device),
        block_size=inner,
    )


def statistics_bytes(blocks: int, nested: Mapping[str, Any] | None) -> int:
    """What lies behind the codes, at least."""
    if nested is None:
        return FP32 * blocks
    return aligned(blocks) + FP32 * block_count(blocks, int(nested["blocksize"]))


def aligned(nbytes: int) -> int:
    """To the next multiple of 4."""
    return FP32 * block_count(nbytes, FP32)
