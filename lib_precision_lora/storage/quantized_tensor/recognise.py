"""Which format a `QuantizedTensor` has: a layout's name, codes and the layout's parameters.

    _layout_cls                     _qdata                 _params
    TensorCoreFP8(E4M3|E5M2)Layout  float8                 scale
    TensorCoreNVFP4Layout           uint8                  block_scale, scale
    TensorCoreMXFP8Layout           float8_e4m3fn          scale
    TensorWiseINT8Layout            int8                   scale, convrot, convrot_groupsize
    TensorCoreConvRotW4A4Layout     int8, two to a byte    scale, convrot_groupsize

Each `_params` has `orig_shape`, the logical shape; the tensor's own dtype is only that in which its host
computes. Source: comfy-kitchen 0.2.19 (Apache-2.0), as Forge Neo 2.26 makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..fp8 import FP8_KINDS, ScaledWeight, scale_column
from ..weight import StorageError, StoredWeight, plain
from .block_scaled import mxfp8_weight, nvfp4_weight
from .integers import IntegerWeight, RotatedNibbles, RotatedWeight, check_group

Reader = Callable[[Tensor, Any], StoredWeight]
"""(codes, parameters) -> the weight."""


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensor(ScaledWeight):
    """FP8 whose scale is part of the tensor, not of the module."""


def quantized_tensor_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises `_qdata`, `_params` and `_layout_cls`.

    Raises StorageError for a layout that is not understood, and for parts that do not fit together.
    """
    layout: Any = getattr(parameter, "_layout_cls", None)
    codes, params = getattr(parameter, "_qdata", None), getattr(parameter, "_params", None)
    if layout is None or params is None or not isinstance(codes, Tensor):
        return None
    name = layout if isinstance(layout, str) else getattr(layout, "__name__", str(layout))
    read = READERS.get(name)
    if read is None:
        raise StorageError(
            f"comfy-kitchen's layout {name} of a weight of shape {list(params.orig_shape)} is not "
            "understood; leave this layer unpatched, or load a checkpoint in FP8, NVFP4, MXFP8 or int8."
        )
    if getattr(params, "transposed", False):
        raise StorageError(
            f"A transposed {name} of shape {list(params.orig_shape)} is not understood; "
            "pass the parameter itself."
        )
    return read(plain(codes), params)


def fp8_tensor(codes: Tensor, params: Any) -> ScaledTensor:
    """stored · scale."""
    shape, kind = logical_shape(params), FP8_KINDS.get(codes.dtype, "")
    if not kind or tuple(codes.size()) != shape:
        raise mismatch("fp8", shape, codes)
    kind = f"{kind}-scaled"
    return ScaledTensor(shape, kind, codes, row_scale(params, shape, kind))


def nvfp4_tensor(codes: Tensor, params: Any) -> StoredWeight:
    shape = logical_shape(params)
    if codes.dtype != torch.uint8:
        raise mismatch("nvfp4", shape, codes)
    return nvfp4_weight(shape, codes, plain(params.block_scale), plain(params.scale))


def mxfp8_tensor(codes: Tensor, params: Any) -> StoredWeight:
    shape = logical_shape(params)
    if codes.dtype not in FP8_KINDS:
        raise mismatch("mxfp8", shape, codes)
    return mxfp8_weight(shape, codes, plain(params.scale))


def int8_tensor(codes: Tensor, params: Any) -> StoredWeight:
    shape = logical_shape(params)
    if codes.dtype != torch.int8 or tuple(codes.size()) != shape:
        raise mismatch("int8", shape, codes)
    scale = row_scale(params, shape, "int8")
    if not getattr(params, "convrot", False):
        return IntegerWeight(shape, "int8", codes, scale)
    group = int(params.convrot_groupsize)
    check_group("int8-convrot", shape, group)
    return RotatedWeight(shape, "int8-convrot", codes, scale, group)


def int4_tensor(codes: Tensor, params: Any) -> StoredWeight:
    shape, group = logical_shape(params), int(params.convrot_groupsize)
    check_group("int4-convrot", shape, group)
    if codes.dtype not in (torch.int8, torch.uint8) or tuple(codes.size()) != (shape[0], shape[1] // 2):
        raise mismatch("int4-convrot", shape, codes)
    return RotatedNibbles(shape, "int4-convrot", codes, row_scale(params, shape, "int4-convrot"), group)


def logical_shape(params: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in params.orig_shape)


def row_scale(params: Any, shape: tuple[int, ...], kind: str) -> Tensor:
    """Of one element or one per row. Raises StorageError where there is none, or it does not fit."""
    if not isinstance(params.scale, Tensor):
        raise StorageError(
            f"An {kind} weight of shape {list(shape)} has no weight_scale, so its values are unknown; "
            "load a whole checkpoint."
        )
    return scale_column(params.scale, shape, kind, "weight_scale")


def mismatch(kind: str, shape: tuple[int, ...], codes: Tensor) -> StorageError:
    return StorageError(
        f"An {kind} weight of shape {list(shape)} cannot be read from {codes.dtype} of shape "
        f"{list(codes.size())}; load the checkpoint again."
    )


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "TensorCoreFP8Layout": fp8_tensor,
        "TensorCoreFP8E4M3Layout": fp8_tensor,
        "TensorCoreFP8E5M2Layout": fp8_tensor,
        "TensorCoreNVFP4Layout": nvfp4_tensor,
        "TensorCoreMXFP8Layout": mxfp8_tensor,
        "TensorWiseINT8Layout": int8_tensor,
        "TensorCoreConvRotW4A4Layout": int4_tensor,
    }
)
