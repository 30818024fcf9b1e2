"""bitsandbytes NF4 and FP4, encoded in plain torch on whatever device the values lie on.

    absmax[k] = max |W| of block k           nibble i = that of the code nearest to W[i] / absmax[⌊i / B⌋]

Nested statistics keep absmax as `code[packed] · scale + offset` with offset = mean(absmax); the nibbles are
then chosen for the absmax that is decoded, so that its own rounding costs less. The format is that of
`bitsandbytes.functional.quantize_4bit`; its kernels need a GPU in some versions, this does not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import block_count
from .bnb4 import four_bit_weight, nested_statistics
from .encoded import Encoded
from .weight import StorageError, plain

VALUES_PER_CALL = 1 << 22
"""Bounds the temporary tensors, several times as large."""

FEW_CODES = 16
"""For so many, counting those below a value is twice as fast as a search."""


def encode_four_bit(attribute: str, parameter: Tensor, state: Any, values: Tensor) -> Encoded:
    """Values as a state dict holds them for a `Params4bit` of this `QuantState`.

    Block size, codes and the kind of statistics are those of the state; values: fp32 or fp64, [out, ...].
    Raises StorageError for values that are not finite.
    """
    block_size, device = int(state.blocksize), values.device
    flat = values.reshape(-1)
    blocks = pad(flat, (0, block_count(flat.numel(), block_size) * block_size - flat.numel()))
    blocks = blocks.view(-1, block_size)
    largest = blocks.abs().amax(1).to(torch.float32)
    if not bool(largest.isfinite().all()):
        raise StorageError("a value of it would not be finite; lower the strengths of the LoRAs")
    written = _with_statistics(state, largest, tuple(values.shape))
    absmax = _absmax(written, len(largest)).to(device)
    packed = _packed(blocks, absmax, plain(state.code).to(device, torch.float32), flat.numel())
    stored = plain(parameter)
    size = -(-packed.numel() // stored.element_size()) * stored.element_size()
    if packed.numel() != stored.numel() * stored.element_size():
        stored = stored.new_empty(size // stored.element_size(), 1, device="meta")
    data = pad(packed, (0, size - packed.numel())).view(stored.dtype).view(stored.shape)
    entries = {attribute: data}
    for key, value in written.as_dict(packed=True).items():
        entries[f"{attribute}.{key}"] = plain(value).clone()
    return Encoded(entries, four_bit_weight(data, written))


def _with_statistics(state: Any, largest: Tensor, shape: tuple[int, ...]) -> Any:
    """A copy of the state with these absmax: fp32 [blocks]."""
    written = copy.copy(state)
    written.shape = torch.Size(shape)
    if not state.nested:
        written.absmax = largest.to(plain(state.absmax).dtype)
        return written
    written.state2 = copy.copy(state.state2)
    written.offset = largest.mean().to(plain(state.offset).dtype)
    size = int(state.state2.blocksize)
    centred = largest - written.offset.to(torch.float32)
    groups = pad(centred, (0, block_count(len(centred), size) * size - len(centred))).view(-1, size)
    scale = groups.abs().amax(1).to(plain(state.state2.absmax).dtype)
    code = plain(state.state2.code).to(largest.device, torch.float32)
    numbers = _nearest_codes(groups, scale.to(torch.float32), code)
    written.absmax = numbers.view(-1)[: len(largest)].contiguous()
    written.state2.absmax = scale
    written.state2.code = code
    return written


def _absmax(state: Any, blocks: int) -> Tensor:
    """What a decoder reads: fp32 [blocks]."""
    if state.nested:
        return nested_statistics(state).absmax(0, blocks)
    return plain(state.absmax).to(torch.float32)


def _packed(blocks: Tensor, absmax: Tensor, code: Tensor, count: int) -> Tensor:
    """Two nibbles to a byte, the earlier value in the high one: uint8 [⌈count / 2⌉]."""
    step = max(2, VALUES_PER_CALL // blocks.shape[1] // 2 * 2)
    nibbles = [
        _nearest_codes(blocks[at : at + step], absmax[at : at + step], code).view(-1)
        for at in range(0, len(blocks), step)
    ]
    whole = pad(torch.cat(nibbles)[:count], (0, count % 2))
    return whole[0::2] << 4 | whole[1::2]


def _nearest_codes(blocks: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    """For each value of `blocks`, [n, B], the number of the code nearest to `value / scale[n]`: uint8.

    A block whose scale is 0 decodes to zeros whatever its codes are.
    """
    order = torch.argsort(code)
    ascending = code[order]
    middles = (ascending[1:] + ascending[:-1]) / 2
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    quotient = (blocks / divisor.view(-1, 1).to(blocks)).to(torch.float32)
    if len(code) > FEW_CODES:
        return order[torch.bucketize(quotient, middles)].to(torch.uint8)
    numbers = torch.zeros(quotient.shape, dtype=torch.uint8, device=quotient.device)
    for middle in middles:
        numbers += quotient > middle
    in_order = torch.equal(order, torch.arange(len(order), device=order.device))
    return numbers if in_order else order.to(torch.uint8)[numbers.long()]
