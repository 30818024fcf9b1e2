"""The values of GGUF blocks, by torch operations on the device where the bytes lie.

A block is a run of fields, each of a fixed number of bytes: `BLOCK_LAYOUTS` lists them in their order. Scales
d and minima m are fp16, codes q are packed low bits first. Products of a block's scales and codes are exact
in fp32 or rounded once, so that every order of them gives the same bits.

Source: the block definitions of the GGUF format (ggml, `ggml-common.h`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

NONLINEAR_CODES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The values of the 16 codes of IQ4_NL and IQ4_XS."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """One GGUF type: values per block, bytes of each field, and the decoder of these fields.

    decode: one uint8 [n, bytes] per field -> fp32 [n, …], block_size values per block, memory of its own.
    """

    block_size: int
    field_bytes: tuple[int, ...]
    fields_to_values: Callable[..., Tensor]

    @property
    def block_bytes(self) -> int:
        return sum(self.field_bytes)

    def decode(self, blocks: Tensor) -> Tensor:
        """uint8 [n, block_bytes] -> fp32 [n, block_size]."""
        values = self.fields_to_values(*blocks.split_with_sizes(self.field_bytes, 1))
        return values.view(blocks.shape[0], self.block_size)


def half(field: Tensor) -> Tensor:
    """uint8 [n, 2] read as fp16: fp32 [n, 1]."""
    return field.clone(memory_format=torch.contiguous_format).view(torch.float16).to(torch.float32)


def unpacked(field: Tensor, bits: int) -> Tensor:
    """uint8 [..., k] -> uint8 [..., 8 / bits, k]: first the lowest bits of all k bytes, then the next."""
    return torch.stack(shifted(field, bits), -2)


def shifted(field: Tensor, bits: int) -> list[Tensor]:
    """The lowest `bits` of all bytes, the next of all bytes, ..."""
    field, mask = field.contiguous(), (1 << bits) - 1
    return [(field >> shift) & mask for shift in range(0, 8, bits)]


def bit_by_value(field: Tensor) -> Tensor:
    """uint8 [n, k] -> uint8 [n, 8k]: bit i of all is that of value i, the lowest of a byte first."""
    return torch.stack(shifted(field, 1), -1).flatten(1)


def numbers(codes: Tensor) -> Tensor:
    """Integers as fp32."""
    return codes.to(torch.float32)


def q4_0(d: Tensor, codes: Tensor) -> Tensor:
    """w = (q − 8) · d."""
    return numbers(unpacked(codes, 4).flatten(1)).sub_(8).mul_(half(d))


def q4_1(d: Tensor, m: Tensor, codes: Tensor) -> Tensor:
    """w = q · d + m."""
    return numbers(unpacked(codes, 4).flatten(1)).mul_(half(d)).add_(half(m))


def q5_0(d: Tensor, fifth: Tensor, codes: Tensor) -> Tensor:
    """w = (q − 16) · d; fifth: the highest bit of each value."""
    return numbers(five_bits(fifth, codes)).sub_(16).mul_(half(d))


def q5_1(d: Tensor, m: Tensor, fifth: Tensor, codes: Tensor) -> Tensor:
    """w = q · d + m; fifth: the highest bit of each value."""
    return numbers(five_bits(fifth, codes)).mul_(half(d)).add_(half(m))


def five_bits(fifth: Tensor, codes: Tensor) -> Tensor:
    """uint8 [n, 4] and [n, 16] -> uint8 [n, 32]."""
    return unpacked(codes, 4).flatten(1).bitwise_or_(bit_by_value(fifth) << 4)


def q8_0(d: Tensor, codes: Tensor) -> Tensor:
    """w = q · d, q signed."""
    return numbers(codes.view(torch.int8)).mul_(half(d))


def q2_k(scales: Tensor, codes: Tensor, d: Tensor, dm: Tensor) -> Tensor:
    """w = q · (s · d) − t · dm; s, t: low and high 4 bits of `scales`, one byte for 16 values."""
    values = numbers(unpacked(codes.reshape(-1, 2, 32), 2)).view(-1, 16, 16)
    return scaled(values, numbers(scales & 15) * half(d)).sub_((numbers(scales >> 4) * half(dm))[..., None])


def q3_k(third: Tensor, codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """w = (q − 4) · ((s − 32) · d); third: the highest bit of each value; s: 6 bits for 16 values."""
    low = unpacked(codes.reshape(-1, 2, 32), 2).view(-1, 8, 32)
    values = numbers(low.bitwise_or_(unpacked(third, 1) << 2)).sub_(4).view(-1, 16, 16)
    low_scales, high_scales = scales.split_with_sizes((8, 4), 1)
    scale = unpacked(low_scales, 4).flatten(1) | (unpacked(high_scales, 2).flatten(1) << 4)
    return scaled(values, (numbers(scale) - 32) * half(d))


def q4_k(d: Tensor, dm: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """w = q · (s · d) − t · dm; s, t: `six_bit_pairs` of `scales`, one of each for 32 values."""
    values = numbers(unpacked(codes.reshape(-1, 4, 32), 4)).view(-1, 8, 32)
    s, t = six_bit_pairs(scales)
    return scaled(values, numbers(s) * half(d)).sub_((numbers(t) * half(dm))[..., None])


def q5_k(d: Tensor, dm: Tensor, scales: Tensor, fifth: Tensor, codes: Tensor) -> Tensor:
    """w = q · (s · d) − t · dm, as Q4_K; fifth: the highest bit of each value."""
    low = unpacked(codes.reshape(-1, 4, 32), 4).view(-1, 8, 32)
    values = numbers(low.bitwise_or_(unpacked(fifth, 1) << 4))
    s, t = six_bit_pairs(scales)
    return scaled(values, numbers(s) * half(d)).sub_((numbers(t) * half(dm))[..., None])


def six_bit_pairs(scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, 12] -> two times uint8 [n, 8].

    The low 6 bits of bytes 0 to 3 and 4 to 7 are the first halves; bytes 8 to 11 hold the low 4 bits of the
    second halves, whose high 2 bits are those of the former.
    """
    first, second, third = scales.split_with_sizes((4, 4, 4), 1)
    s = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), 1)
    t = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), 1)
    return s, t


def q6_k(codes: Tensor, high: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """w = (q − 32) · (s · d); high: the 2 highest bits of each value; s: a signed byte for 16 values."""
    low = unpacked(codes.reshape(-1, 2, 64), 4).view(-1, 2, 4, 32)
    codes = low.bitwise_or_(unpacked(high.reshape(-1, 2, 32), 2) << 4)
    return scaled(numbers(codes).sub_(32).view(-1, 16, 16), numbers(scales.view(torch.int8)) * half(d))


def iq4_nl(d: Tensor, codes: Tensor) -> Tensor:
    """w = value(q) · d, value: `NONLINEAR_CODES`."""
    return nonlinear(unpacked(codes, 4).flatten(1)).mul_(half(d))


def iq4_xs(d: Tensor, high_scales: Tensor, low_scales: Tensor, codes: Tensor) -> Tensor:
    """w = value(q) · ((s − 32) · d); s: 6 bits for 32 values, value: `NONLINEAR_CODES`."""
    values = nonlinear(unpacked(codes.reshape(-1, 8, 16), 4)).view(-1, 8, 32)
    low = torch.stack(shifted(low_scales, 4), -1).flatten(1)
    high = torch.stack(shifted(high_scales, 2), -1).flatten(1)
    return scaled(values, (numbers(low | (high << 4)) - 32) * half(d))


def nonlinear(codes: Tensor) -> Tensor:
    """`NONLINEAR_CODES` of uint8 codes, in fp32."""
    table = torch.tensor(NONLINEAR_CODES, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().int()).view_as(codes)


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """fp32 [n, k, w] times its run's scale, [n, k]; in place."""
    return values.mul_(scale[..., None])


BLOCK_LAYOUTS = MappingProxyType(
    {
        "Q4_0": BlockLayout(32, (2, 16), q4_0),
        "Q4_1": BlockLayout(32, (2, 2, 16), q4_1),
        "Q5_0": BlockLayout(32, (2, 4, 16), q5_0),
        "Q5_1": BlockLayout(32, (2, 2, 4, 16), q5_1),
        "Q8_0": BlockLayout(32, (2, 32), q8_0),
        "Q2_K": BlockLayout(256, (16, 64, 2, 2), q2_k),
        "Q3_K": BlockLayout(256, (32, 64, 12, 2), q3_k),
        "Q4_K": BlockLayout(256, (2, 2, 12, 128), q4_k),
        "Q5_K": BlockLayout(256, (2, 2, 12, 32, 128), q5_k),
        "Q6_K": BlockLayout(256, (128, 64, 16, 2), q6_k),
        "IQ4_NL": BlockLayout(32, (2, 16), iq4_nl),
        "IQ4_XS": BlockLayout(256, (2, 2, 4, 128), iq4_xs),
    }
)
