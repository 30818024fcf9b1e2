"""Stand-ins for Forge Neo's `ParameterNF4` and `ParameterInt8`: weights in one buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.storage.quantized_tensors import doubles, integers, turned, turned_doubles


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


class Int8Parameter(OneBufferParameter):
    """What is relied on of `ParameterInt8`."""

    def w8(self) -> Tensor:
        raise AssertionError("the host's own view of its bytes is not needed")


def int8_in_one_buffer(matrix: Tensor, host: type[Int8Parameter], group: int) -> tuple[Int8Parameter, Tensor]:
    """The parameter as this host's class, and its values in fp32; group: of columns that it rotates, or 1."""
    scale, codes = integers(turned(matrix, group), 127, per_row=True)
    values = turned_doubles(doubles(codes), group) * doubles(scale)
    buffer = torch.cat((codes.t().contiguous().view(-1).view(torch.uint8), scale.view(-1).view(torch.uint8)))
    parameter = host(buffer, real_shape=torch.Size(matrix.shape), computation_dtype=torch.float16)
    return parameter, torch.from_numpy(values).float()
