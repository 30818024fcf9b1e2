"""GGUF blocks in the layout that Forge "bakes" them into when it loads a model.

Baking keeps the number of bytes. Every 16-bit block scale s is cast to the layer's compute type C (fp16 or
bf16), and 4-bit codes are reordered so that byte i holds value 2i in its low and 2i + 1 in its high nibble.

    type   values  bytes of one block
    Q8_0     32    s C, 32 int8                        w = q · s
    Q4_0     32    s C, 16 bytes of codes              w = (q − 8) · s
    Q4_1     32    s C, m C, 16 bytes of codes         w = q · s + m
    Q4_K    256    s C[8], m C[8], 128 bytes of codes  w = q · s − m, s and m one per 32 values

Other types keep their layout and are read as standard GGUF. Source: the observed layout of Forge's
`gguf.quants`, dfdcbab (2025-06-26).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from .blocks import BlockedWeight, block_count
from .weight import StorageError

COMPUTE_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class BakedLayout:
    """One baked type. decode: (blocks uint8 [n, block_bytes], compute type) -> fp32 [n, block_size]."""

    block_size: int
    block_bytes: int
    decode: Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class BakedWeight(BlockedWeight):
    """W0 = layout.decode(blocks), in fp32. blocks: uint8 [n, block_bytes]."""

    blocks: Tensor
    compute: torch.dtype
    layout: BakedLayout

    @property
    def nbytes(self) -> int:
        return self.blocks.numel()

    def undecoded(self, first: int, last: int) -> Tensor:
        return self.blocks.narrow(0, first, last - first)

    def decode_blocks(self, first: int, last: int) -> Tensor:
        return self.layout.decode(self.undecoded(first, last), self.compute)


def scales(stored: Tensor, compute: torch.dtype) -> Tensor:
    """uint8 [n, 2k] read as the compute type: fp32 [n, k]."""
    return stored.contiguous().view(compute).to(torch.float32)


def codes(stored: Tensor) -> Tensor:
    """uint8 [n, k] -> uint8 [n, 2k], the low nibble first."""
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)


def decode_q8_0(blocks: Tensor, compute: torch.dtype) -> Tensor:
    """w = q · s."""
    return blocks[:, 2:].view(torch.int8) * scales(blocks[:, :2], compute)


def decode_q4_0(blocks: Tensor, compute: torch.dtype) -> Tensor:
    """w = (q − 8) · s."""
    return (codes(blocks[:, 2:]).to(torch.float32) - 8) * scales(blocks[:, :2], compute)


def decode_q4_1(blocks: Tensor, compute: torch.dtype) -> Tensor:
    """w = q · s + m."""
    return codes(blocks[:, 4:]) * scales(blocks[:, :2], compute) + scales(blocks[:, 2:4], compute)


def decode_q4_k(blocks: Tensor, compute: torch.dtype) -> Tensor:
    """w = q · s − m, with s and m for each of eight runs of 32 values."""
    scale = scales(blocks[:, :16], compute).unsqueeze(-1)
    minimum = scales(blocks[:, 16:32], compute).unsqueeze(-1)
    quants = codes(blocks[:, 32:]).view(-1, 8, 32)
    return (quants * scale - minimum).flatten(1)


BAKED_LAYOUTS = MappingProxyType(
    {
        "Q8_0": BakedLayout(32, 34, decode_q8_0),
        "Q4_0": BakedLayout(32, 18, decode_q4_0),
        "Q4_1": BakedLayout(32, 20, decode_q4_1),
        "Q4_K": BakedLayout(256, 160, decode_q4_k),
    }
)


def baked_weight(stored: Tensor, type_name: str, compute: object, shape: tuple[int, ...]) -> BakedWeight:
    """The weight over baked bytes [nbytes]; type_name is a key of `BAKED_LAYOUTS`.

    Raises StorageError for a compute type other than fp16 and bf16 and for a wrong number of bytes.
    """
    layout = BAKED_LAYOUTS[type_name]
    needed = block_count(prod(shape), layout.block_size) * layout.block_bytes
    if not isinstance(compute, torch.dtype) or compute not in COMPUTE_TYPES or stored.numel() != needed:
        raise StorageError(
            f"A baked GGUF {type_name} weight of shape {list(shape)} needs {needed} bytes with scales in "
            f"fp16 or bf16, but holds {stored.numel()} with scales in {compute}; load the checkpoint again."
        )
    return BakedWeight(
        shape=shape,
        kind=f"gguf-{type_name}-baked",
        block_size=layout.block_size,
        blocks=stored.view(-1, layout.block_bytes),
        compute=compute,
        layout=layout,
    )
