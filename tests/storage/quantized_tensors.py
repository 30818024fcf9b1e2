"""comfy-kitchen's `QuantizedTensor` as a stand-in, its bytes made by hand, and what they mean in float64.

    NVFP4   value(code) · block scale · tensor scale      E2M1, E4M3 for 16 values of a row, fp32
    MXFP8   code · 2^(exponent − 127)                     E4M3, one exponent for 32 values of a row
    int8    code · scale                                  one scale, or one per row
    ConvRot (codes · H) · scale                           H on groups of columns; 8 bits, or 4

Every product is exact in float64 and rounded to fp32 once, so these are the correctly rounded values. Scales
of blocks lie where cuBLAS wants them, by its formula. `test_quantized_tensor.py` holds all of it to the
package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FP8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Params:
    """What is relied on of a layout's parameters."""

    scale: Tensor
    orig_shape: tuple[int, ...]
    orig_dtype: torch.dtype = torch.bfloat16
    block_scale: Tensor | None = None
    transposed: bool = False
    convrot: bool = False
    convrot_groupsize: int = 256


class StandInTensor(torch.Tensor):
    """What is relied on of a `QuantizedTensor`: its attributes, and that a parameter or a copy of it is one.

    It says bf16 and the logical shape, and has no memory of its own. Everything else that is done with it
    fails: the package would decode it, rounded to bf16.
    """

    @staticmethod
    def __new__(cls, qdata: Tensor, layout: str, params: Params) -> StandInTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, params.orig_shape, device=qdata.device, dtype=params.orig_dtype
        )

    def __init__(self, qdata: Tensor, layout: str, params: Params) -> None:
        self._qdata, self._layout_cls, self._params = qdata, layout, params

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> StandInTensor:
        own = args[0]
        if func is torch.ops.aten.detach.default:
            return cls(own._qdata, own._layout_cls, own._params)
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return cls(own._qdata.clone(), own._layout_cls, own._params)
        raise AssertionError(f"{func} decodes a QuantizedTensor, which rounds it to bf16")

    def __repr__(self) -> str:
        return f"StandInTensor({self._layout_cls}, {list(self._params.orig_shape)})"


@dataclass(frozen=True)
class QuantizedMatrix:
    """parameter: as a module holds it; expected: W0 in fp32; parts: all tensors that are stored."""

    parameter: torch.nn.Parameter
    expected: Tensor

    @property
    def parts(self) -> list[Tensor]:
        params = self.parameter._params
        return [
            part for part in (self.parameter._qdata, params.scale, params.block_scale) if part is not None
        ]


def quantized(qdata: Tensor, layout: str, params: Params, values: Doubles) -> QuantizedMatrix:
    rows, columns = params.orig_shape
    expected = torch.from_numpy(values[:rows, :columns].astype(np.float32))
    tensor = StandInTensor(qdata, layout, params)
    return QuantizedMatrix(torch.nn.Parameter(tensor, requires_grad=False), expected)


def fp8(dtype: torch.dtype, layout: str, matrix: Tensor) -> QuantizedMatrix:
    scale = (matrix.abs().max() / torch.finfo(dtype).max).clamp(min=1e-12)
    stored = (matrix / scale).to(dtype)
    values = doubles(stored) * float(scale)
    return quantized(stored, layout, Params(scale, tuple(matrix.shape)), values)


def nvfp4(matrix: Tensor) -> QuantizedMatrix:
    blocks = padded(matrix, 16)
    tensor_scale = (matrix.abs().max() / (448 * 6)).clamp(min=1e-12)
    largest = blocks.abs().amax(2)
    scale = (largest / 6 / tensor_scale).clamp(max=448).to(torch.float8_e4m3fn)
    step = scale.double() * tensor_scale.double()
    quotient = blocks.double() / torch.where(step == 0, 1.0, step)[..., None]
    codes = nearest(torch.tensor(E2M1[:8], dtype=torch.float64), quotient.abs())
    codes = (codes + 8 * (quotient < 0)).flatten(1)
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    values = np.array(E2M1)[codes.numpy()].reshape(blocks.shape) * doubles(step)[..., None]
    params = Params(tensor_scale, tuple(matrix.shape), block_scale=in_tiles(scale))
    return quantized(packed, "TensorCoreNVFP4Layout", params, values.reshape(len(blocks), -1))


def mxfp8(matrix: Tensor) -> QuantizedMatrix:
    blocks = padded(matrix, 32)
    largest = doubles(blocks.abs().amax(2))
    exponent = np.ceil(np.log2(np.maximum(largest / 448, 2.0**-127))).astype(np.int64)
    stored = (blocks.double() / torch.from_numpy(2.0**exponent)[..., None]).float().to(torch.float8_e4m3fn)
    values = doubles(stored) * 2.0 ** exponent[..., None]
    scale = in_tiles(torch.from_numpy((exponent + 127).astype(np.uint8)))
    if hasattr(torch, "float8_e8m0fnu"):
        scale = scale.view(torch.float8_e8m0fnu)
    params = Params(scale, tuple(matrix.shape))
    return quantized(stored.flatten(1), "TensorCoreMXFP8Layout", params, values.reshape(len(blocks), -1))


def int8(per_row: bool, matrix: Tensor) -> QuantizedMatrix:
    scale, codes = integers(matrix, 127, per_row)
    values = doubles(codes) * doubles(scale)
    return quantized(codes, "TensorWiseINT8Layout", Params(scale, tuple(matrix.shape)), values)


def int8_convrot(matrix: Tensor) -> QuantizedMatrix:
    group = largest_group(matrix.shape[1])
    scale, codes = integers(turned(matrix, group), 127, per_row=True)
    values = turned_doubles(doubles(codes), group) * doubles(scale)
    params = Params(scale, tuple(matrix.shape), convrot=True, convrot_groupsize=group)
    return quantized(codes, "TensorWiseINT8Layout", params, values)


def int4_convrot(matrix: Tensor) -> QuantizedMatrix:
    group = largest_group(matrix.shape[1])
    scale, codes = integers(turned(matrix, group), 7, per_row=True)
    values = turned_doubles(doubles(codes), group) * doubles(scale)
    nibbles = codes.view(torch.uint8) & 15
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int8)
    params = Params(scale.flatten(), tuple(matrix.shape), convrot_groupsize=group)
    return quantized(packed, "TensorCoreConvRotW4A4Layout", params, values)


def integers(matrix: Tensor, most: int, per_row: bool) -> tuple[Tensor, Tensor]:
    largest = matrix.abs().amax(1, keepdim=True) if per_row else matrix.abs().max()
    scale = (largest / most).clamp(min=1e-30)
    return scale, (matrix / scale).round().clamp(-most, most).to(torch.int8)


def largest_group(columns: int) -> int:
    groups = [4**power for power in range(1, 5) if columns % 4**power == 0]
    if not groups:
        raise ValueError(f"{columns} columns are no whole number of groups of 4")
    return groups[-1]


def hadamard(group: int) -> Doubles:
    """[group, group], symmetric, its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < group:
        matrix = np.kron(matrix, H4)
    return matrix / np.sqrt(group)


def turned_doubles(values: Doubles, group: int) -> Doubles:
    return (values.reshape(len(values), -1, group) @ hadamard(group)).reshape(values.shape)


def turned(matrix: Tensor, group: int) -> Tensor:
    return torch.from_numpy(turned_doubles(doubles(matrix), group)).float()


def padded(matrix: Tensor, block: int) -> Tensor:
    """[rows, blocks, block], zeros up to a multiple of the block in both directions."""
    rows, columns = (-(-size // block) * block for size in matrix.shape)
    whole = torch.zeros(rows, columns)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole.view(rows, -1, block)


def in_tiles(scales: Tensor) -> Tensor:
    """Each scale at its place by cuBLAS's formula; [rows, blocks] up to multiples of 128 and 4."""
    rows, blocks = scales.shape
    down, across = -(-rows // 128), -(-blocks // 4)
    flat = torch.zeros(down * across * 512, dtype=torch.uint8)
    for r in range(rows):
        for k in range(blocks):
            place = (r // 128 * across + k // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + k % 4
            flat[place] = scales[r, k].view(torch.uint8)
    return flat.view(scales.dtype).view(down * 128, across * 4)


def nearest(table: Tensor, values: Tensor) -> Tensor:
    """Numbers of the nearest entries; of two, the first."""
    return (values[..., None] - table).abs().argmin(-1)


def doubles(values: Tensor) -> Doubles:
    wide: Doubles = values.detach().double().numpy()
    return wide


MAKERS: dict[str, Callable[[Tensor], QuantizedMatrix]] = {
    "comfy-fp8-e4m3fn-scaled": partial(fp8, torch.float8_e4m3fn, "TensorCoreFP8E4M3Layout"),
    "comfy-fp8-e5m2-scaled": partial(fp8, torch.float8_e5m2, "TensorCoreFP8E5M2Layout"),
    "comfy-nvfp4": nvfp4,
    "comfy-mxfp8": mxfp8,
    "comfy-int8": partial(int8, False),
    "comfy-int8-by-row": partial(int8, True),
    "comfy-int8-convrot": int8_convrot,
    "comfy-int4-convrot": int4_convrot,
}
