"""Forge Neo's `ParameterInt8` (2.29 and later): a weight that the host itself has quantized to 8 bits.

    bytes        int8 codes, transposed: [in, out] | fp32 scales: [out]
    attributes   real_shape, and the methods w8() and scale()

    W0 = codesᵀ · scale, or (codesᵀ · H) · scale where the host rotates groups of columns

The parameter does not say whether they are rotated. A host that does so has a function `rot_group(columns)`
beside its class, which gives the group, 0 for none; the others have none. Sources: the layouts in
Haoming02/sd-webui-forge-classic, `backend/operations_int8.py`, 1749b7d, and in Skimcult/sd-webui-forge-neo,
3809dc5.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .quantized_tensor.integers import IntegerWeight, check_group, rotated
from .weight import StorageError, StoredWeight, flat_bytes

FP32 = 4


@dataclass(frozen=True, slots=True, eq=False)
class TransposedIntegers(IntegerWeight):
    """codes: int8 [in, out]; group: of columns that are rotated together, 1 for none."""

    group: int

    def integers(self, start: int, stop: int) -> Tensor:
        values = self.codes[:, start:stop].t().to(torch.float32, memory_format=torch.contiguous_format)
        return rotated(values, self.group)


def int8_parameter_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises `real_shape` with `w8`; raises StorageError where shape and bytes do not fit together."""
    real_shape = getattr(parameter, "real_shape", None)
    if real_shape is None or not callable(getattr(parameter, "w8", None)):
        return None
    shape, buffer = tuple(int(size) for size in real_shape), flat_bytes(parameter)
    if len(shape) != 2 or buffer.numel() != shape[0] * (shape[1] + FP32):
        raise StorageError(
            f"An int8 weight of shape {list(shape)} in one buffer does not take {buffer.numel()} bytes; load "
            "the checkpoint again."
        )
    rows, columns = shape
    group, kind = rotation_group(type(parameter), columns), "int8"
    if group > 1:
        kind = "int8-convrot"
        check_group(kind, shape, group)
    codes = buffer[: rows * columns].view(torch.int8).view(columns, rows)
    scale = buffer[rows * columns :].view(torch.float32).view(rows, 1)
    return TransposedIntegers(shape, kind, codes, scale, group)


def rotation_group(host_class: type, columns: int) -> int:
    """Of a weight with so many columns, as the module of the host's class has it; 1 for none."""
    function: Any = getattr(sys.modules.get(host_class.__module__), "rot_group", None)
    return int(function(columns)) or 1 if callable(function) else 1
