"""A stock-like merge: a model, written here, of what a WebUI without Precision LoRA makes of a LoRA.

    values  = dequantize(stored)                     in the compute type C
    merged  = values + alpha / rank · up · down      summed in fp32, given back in C
    stored' = requantize(merged)                     in C, which is where the LoRA is lost

It is no copy of any host's code. It follows the behaviour that was observed of stock Forge on a card with
bf16; Q4_0 and Q8_0 are the only ones of these GGUF types that have a requantizer there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import LoRA
from lib_precision_lora.report.demo.quiet_bitsandbytes import functional as bnb
from lib_precision_lora.storage import stored_weight

COMPUTE_TYPE = torch.bfloat16
GGUF_VALUES = 32


class NoRequantizerError(NotImplementedError):
    """The stored format can be read, but a merged weight cannot be stored in it again."""


@dataclass(frozen=True, slots=True)
class StockFormat:
    """dequantize: parameter → C, [out, in]; requantize: C → the new stored weight, as a decoder to fp32."""

    dequantize: Callable[[nn.Parameter], Tensor]
    requantize: Callable[[Tensor], Callable[[], Tensor]]


def stock_like_merge(stored: StockFormat, weight: nn.Parameter, lora: LoRA) -> Callable[[], Tensor]:
    """`requantize(dequantize(W) + scale · up · down)`: a decoder of the merged weight, fp32 [out, in].

    Raises NoRequantizerError for a format that has none.
    """
    values = stored.dequantize(weight)
    delta = lora.scale * (lora.up.float() @ lora.down.float())
    return stored.requantize((values.float() + delta).to(COMPUTE_TYPE))


def cast_again(dtype: torch.dtype, merged: Tensor) -> Callable[[], Tensor]:
    """One rounding to the stored type."""
    return merged.to(dtype).float


def dequantize_nf4(weight: nn.Parameter) -> Tensor:
    values: Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return values.to(COMPUTE_TYPE)


def requantize_nf4(merged: Tensor) -> Callable[[], Tensor]:
    """Blocks of 64 take a new absmax, and each value the nearest of 16 levels."""
    packed, state = bnb.quantize_4bit(merged, blocksize=64, quant_type="nf4")
    state.dtype = torch.float32
    return partial(bnb.dequantize_4bit, packed, state)


def gguf_blocks(weight: nn.Parameter) -> tuple[Tensor, Tensor]:
    """(d, codes) of Q8_0 and Q4_0 blocks: d in C, [n, 1]; codes uint8 [n, 32 or 16]."""
    blocks = weight.data.reshape(-1)
    blocks = blocks.view(weight.tensor_shape[0] * weight.tensor_shape[1] // GGUF_VALUES, -1)  # type: ignore[attr-defined]
    return blocks[:, :2].contiguous().view(torch.float16).to(COMPUTE_TYPE), blocks[:, 2:].contiguous()


def dequantize_q8_0(weight: nn.Parameter) -> Tensor:
    """w = q · d."""
    d, codes = gguf_blocks(weight)
    return (codes.view(torch.int8) * d).view(*weight.tensor_shape)  # type: ignore[attr-defined]


def dequantize_q4_0(weight: nn.Parameter) -> Tensor:
    """w = (q − 8) · d; values 0–15 of a block in the low nibbles, 16–31 in the high ones."""
    d, codes = gguf_blocks(weight)
    natural = torch.cat((codes & 15, codes >> 4), dim=1).to(torch.int8)
    return ((natural - 8) * d).view(*weight.tensor_shape)  # type: ignore[attr-defined]


def requantize_q8_0(merged: Tensor) -> Callable[[], Tensor]:
    """d = max|w| / 127, q = int8(round(w · (1 / d))), all in C.

    In bf16 the product reaches 127.5 for the largest weight of many blocks, is rounded to 128, and the
    cast to int8 makes −128 of it.
    """
    blocks = merged.reshape(-1, GGUF_VALUES)
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    codes = (blocks * inverse(d)).round().to(torch.int32).to(torch.int8)
    return lambda: (codes.float() * d.float()).view(merged.shape)


def requantize_q4_0(merged: Tensor) -> Callable[[], Tensor]:
    """d = w_max / −8 with w_max the value of largest size, q = ⌊w / d + 8.5⌋ within 0 to 15, all in C."""
    blocks = merged.reshape(-1, GGUF_VALUES)
    d = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True)) / -8
    codes = (blocks * inverse(d) + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return lambda: ((codes.float() - 8) * d.float()).view(merged.shape)


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0."""
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def read_by_gguf(weight: nn.Parameter) -> Tensor:
    """Any GGUF type, through the `gguf` package."""
    return stored_weight(weight).dense(COMPUTE_TYPE)


def no_requantizer(merged: Tensor) -> Callable[[], Tensor]:
    raise NoRequantizerError("no requantizer")


def cast_to_compute(weight: nn.Parameter) -> Tensor:
    return weight.data.to(COMPUTE_TYPE)


STOCK_FORMATS: Mapping[str, StockFormat] = {
    "NF4": StockFormat(dequantize_nf4, requantize_nf4),
    "FP8": StockFormat(cast_to_compute, partial(cast_again, torch.float8_e4m3fn)),
    "Q8_0": StockFormat(dequantize_q8_0, requantize_q8_0),
    "Q4_0": StockFormat(dequantize_q4_0, requantize_q4_0),
    "Q4_K": StockFormat(read_by_gguf, no_requantizer),
    "bf16": StockFormat(cast_to_compute, partial(cast_again, torch.bfloat16)),
}
