"""A stand-in for Forge Neo's `ParameterNF4`: bitsandbytes' 4-bit weight in one buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OneBufferParameter(nn.Parameter):
    """What is relied on of `ParameterNF4`: its attributes, and a `shape` that is the logical one."""

    def __new__(cls, data: Tensor, **attributes: object) -> OneBufferParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, **attributes: object) -> None:
        self.__dict__.update(attributes)

    @property
    def shape(self) -> torch.Size:
        return self.real_shape


def in_one_buffer(packed: Tensor, state: Any, quant_type: bool = True) -> OneBufferParameter:
    """state: a `QuantState` of bitsandbytes; quant_type: whether the parameter says its type."""
    parts = [packed, state.absmax] if state.nested else [packed, state.absmax.float()]
    nested = None
    if state.nested:
        parts.append(state.state2.absmax.float())
        nested = {
            "code": state.state2.code.float(),
            "blocksize": state.state2.blocksize,
            "offset": float(state.offset),
            "absmax_bytes": state.absmax.numel(),
        }
    buffer = torch.empty(0, dtype=torch.uint8)
    for part in parts:
        gap = torch.zeros(-buffer.numel() % 4, dtype=torch.uint8)
        buffer = torch.cat((buffer, gap, part.reshape(-1).view(torch.uint8)))
    return OneBufferParameter(
        buffer,
        real_shape=torch.Size(state.shape),
        blocksize=state.blocksize,
        code=state.code.float(),
        packed_bytes=packed.numel(),
        nested=nested,
        computation_dtype=torch.float16,
        **({"quant_type": state.quant_type} if quant_type else {}),
    )
