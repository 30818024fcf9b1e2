"""bitsandbytes NF4 and FP4, decoded in plain torch on whatever device the bytes lie on.

The packed bytes hold two codes each, the high nibble first. Source: `bitsandbytes.functional.quantize_4bit`
and QLoRA, arXiv:2305.14314, for the nested ("double quantized") statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockedWeight, block_count
from .dense import floating_weight
from .weight import StorageError, StoredWeight, flat_bytes, plain


@dataclass(frozen=True, slots=True, eq=False)
class NestedStatistics:
    """absmax[k] = code[packed[k]] · scale[⌊k / block_size⌋] + offset, in fp32.

    packed: uint8 [blocks]; code: fp32 [256]; scale: fp32 [⌈blocks / block_size⌉]; offset: fp32, one element.
    """

    packed: Tensor
    code: Tensor
    scale: Tensor
    offset: Tensor
    block_size: int

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.packed, self.scale, self.offset))

    def absmax(self, first: int, last: int) -> Tensor:
        owner = torch.arange(first, last, device=self.scale.device) // self.block_size
        values = self.code[self.packed[first:last].int()] * self.scale[owner]
        return values.add_(self.offset)


@dataclass(frozen=True, slots=True, eq=False)
class PlainStatistics:
    """absmax[k] as stored. scale: floating [blocks]."""

    scale: Tensor

    @property
    def nbytes(self) -> int:
        return self.scale.numel() * self.scale.element_size()

    def absmax(self, first: int, last: int) -> Tensor:
        return self.scale[first:last].to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class FourBitWeight(BlockedWeight):
    """W0[i] = code[nibble i] · absmax[⌊i / B⌋], in fp32.

    packed: uint8 [≥ ⌈values / 2⌉]; code: fp32 [16].
    """

    packed: Tensor
    code: Tensor
    statistics: NestedStatistics | PlainStatistics

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + self.statistics.nbytes

    def undecoded(self, first: int, last: int) -> Tensor:
        absmax = self.statistics.absmax(first, last)
        return torch.cat((self._codes(first, last).to(absmax), absmax))

    def _codes(self, first: int, last: int) -> Tensor:
        bytes_per_block = self.block_size // 2
        packed = self.packed[first * bytes_per_block : last * bytes_per_block]
        return nn.functional.pad(packed, (0, (last - first) * bytes_per_block - packed.numel()))

    def decode_blocks(self, first: int, last: int) -> Tensor:
        packed = self._codes(first, last)
        pairs = torch.stack((self.code.repeat_interleave(16), self.code.repeat(16)), dim=1)
        pair_of_byte = pairs.view(torch.int64).flatten()  # two values as one number are found much faster
        values = pair_of_byte.index_select(0, packed.int()).view(torch.float32)
        values = values.view(last - first, self.block_size)
        absmax = self.statistics.absmax(first, last).to(values.device)
        return values.mul_(absmax.view(-1, 1))


def bnb4_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises `Params4bit` and its subclasses by their attributes `bnb_quantized` and `quant_state`.

    A parameter that is not quantized yet (bitsandbytes does it on the first move to a GPU) is read as the
    dense values it still holds; those change when it is quantized. Raises StorageError for a quantized
    parameter without its state, or with one that does not fit its bytes.
    """
    quantized = getattr(parameter, "bnb_quantized", None)
    if quantized is None:
        return None
    if not quantized:
        return floating_weight(parameter, f"bnb-{getattr(parameter, 'quant_type', '4bit')}-unquantized")
    state = getattr(parameter, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise StorageError(
            "A bitsandbytes 4-bit weight has no quant_state, so its scales are unknown; "
            "load the checkpoint again, with its quant_state entries."
        )
    return four_bit_weight(parameter, state)


def four_bit_weight(parameter: Tensor, state: Any) -> FourBitWeight:
    """The weight that `bitsandbytes.functional.QuantState` describes, over the parameter's bytes."""
    shape = tuple(int(size) for size in state.shape)
    packed, values, block_size = flat_bytes(parameter), prod(shape), int(state.blocksize)
    blocks = block_count(values, block_size)
    if 2 * packed.numel() < values or state.absmax.numel() < blocks or block_size % 2:
        raise StorageError(
            f"A bnb-{state.quant_type} weight of shape {list(shape)} needs {block_count(values, 2)} bytes "
            f"and {blocks} statistics in blocks of {block_size}, but holds {packed.numel()} and "
            f"{state.absmax.numel()}; load the checkpoint again."
        )
    return FourBitWeight(
        shape=shape,
        kind=f"bnb-{state.quant_type}",
        block_size=block_size,
        packed=packed,
        code=plain(state.code).to(packed.device, torch.float32),
        statistics=nested_statistics(state) if state.nested else PlainStatistics(plain(state.absmax)),
    )


def nested_statistics(state: Any) -> NestedStatistics:
    """The second level of `QuantState`: state2 quantizes absmax − offset, eight bits each."""
    outer = state.state2
    return NestedStatistics(
        packed=plain(state.absmax),
        code=plain(outer.code),
        scale=plain(outer.absmax),
        offset=plain(state.offset),
        block_size=int(outer.blocksize),
    )
