"""Values -> what a host's state dict holds for a parameter: the inverse of decoding, with one rounding.

encoded = encode(module, "weight", parameter, values)
encoded.entries                  # {"weight": …, "weight.absmax": …}, beside the module's other entries
encoded.weight.rows(0, 128)      # what whoever loads them decodes

dense, FP8   the nearest value of the type
scaled       the nearest multiple of `scale_weight`; where values leave its range, a larger scale
NF4, FP4     `bnb4_encode.py`
a `QuantizedTensor`  `quantized_tensor/encode.py`
GGUF, and NF4 and int8 in one buffer
             dense, in the type in which its layer computes: a state dict cannot say what their bytes mean
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .bnb4 import FourBitWeight
from .bnb4_encode import encode_four_bit
from .dense import DENSE_KINDS, DenseWeight
from .encoded import Encoded
from .fitted_scale import divided, fitted_scale
from .fp8 import FP8_KINDS, ScaledWeight, scaled_weight
from .gguf import GGUFWeight
from .gguf_baked import COMPUTE_TYPES, BakedWeight
from .int8_parameter import TransposedIntegers
from .nf4_parameter import OneBufferWeight
from .quantized_tensor.block_scaled import MXFP8Weight, NVFP4Weight
from .quantized_tensor.encode import encode_fp8, encode_integers, encode_mxfp8, encode_nvfp4
from .quantized_tensor.integers import IntegerWeight, RotatedNibbles, RotatedWeight
from .quantized_tensor.recognise import ScaledTensor
from .recognise import stored_weight
from .weight import StorageError, StoredWeight, plain


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a parameter stands: `module.attribute`; parameter: the host's own, stored: its values."""

    module: nn.Module
    attribute: str
    parameter: Tensor
    stored: StoredWeight


def encode(module: nn.Module, attribute: str, parameter: Tensor, values: Tensor) -> Encoded:
    """`values` as `module.attribute` is stored. values: fp32 or fp64, [out, ...], on any device.

    parameter: the host's own, whose format this is; the values may have another number of columns. Nothing
    of it is written, and no entry shares its memory. Raises StorageError for values that are not finite, or
    leave the range of a type that has no scale.
    """
    place = Place(module, attribute, parameter, stored_weight(parameter, module))
    return ENCODERS[type(place.stored)](place, values)


def unlabelled(parameter: Tensor) -> str | None:
    """How a parameter is called whose bytes a state dict holds without what they mean; None for others."""
    if getattr(parameter, "gguf_cls", None) is not None:
        return "GGUF"
    if getattr(parameter, "packed_bytes", None) is not None:
        return "one-buffer NF4"
    return "one-buffer int8" if callable(getattr(parameter, "w8", None)) else None


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a floating type, rounded once; memory of its own.

    Raises StorageError unless all of them are finite and within the type's range.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    limit = torch.finfo(dtype).max
    if not largest <= limit:
        name = {**DENSE_KINDS, **FP8_KINDS}.get(dtype, str(dtype)).removeprefix("dense-")
        raise StorageError(
            f"its largest value would be {largest:.3g}, and {name} ends at {limit:.5g}; lower the strengths "
            "of the LoRAs, or store the checkpoint in a wider type"
        )
    return values.to(dtype, copy=True).contiguous()


def _encode_dense(place: Place, values: Tensor) -> Encoded:
    assert isinstance(place.stored, DenseWeight)
    dtype, kind = place.stored.stored.dtype, place.stored.kind
    return _as_dense(place, nearest(values, dtype), DENSE_KINDS[dtype] if kind.startswith("gguf-") else kind)


def _encode_unlabelled(place: Place, values: Tensor) -> Encoded:
    """In the layer's compute type, fp16 where it has none of 16 bits."""
    compute: Any = getattr(place.parameter, "computation_dtype", None)
    dtype = compute if compute in COMPUTE_TYPES else torch.float16
    return _as_dense(place, nearest(values, dtype), DENSE_KINDS[dtype])


def _as_dense(place: Place, rounded: Tensor, kind: str) -> Encoded:
    return Encoded({place.attribute: rounded}, DenseWeight(tuple(rounded.shape), kind, rounded))


def _encode_scaled(place: Place, values: Tensor) -> Encoded:
    """`stored = round(W / s)`, with s as it is, or `s = max|W| / largest value of the type` where W leaves
    the range that s gives; by row, where each row has its own."""
    stored = place.stored
    assert isinstance(stored, ScaledWeight)
    dtype, limit = stored.stored.dtype, torch.finfo(stored.stored.dtype).max
    scale, written = fitted_scale(values, stored.scale, plain(place.module.scale_weight), limit)  # type: ignore[arg-type]
    rounded = divided(values, scale).clamp_(-limit, limit).to(dtype).contiguous()
    entries = {place.attribute: rounded} | ({} if written is None else {"scale_weight": written})
    return Encoded(entries, scaled_weight(rounded, scale, stored.kind))


def _of_tensor(encoder: Callable[[str, Any, Any, Tensor], Encoded]) -> Callable[[Place, Tensor], Encoded]:
    """For a `QuantizedTensor`, whose scales are its own."""
    return lambda place, values: encoder(place.attribute, place.parameter, place.stored, values)


def _encode_four_bit(place: Place, values: Tensor) -> Encoded:
    state = getattr(place.parameter, "quant_state", None) or getattr(place.module, "quant_state", None)
    return encode_four_bit(place.attribute, place.parameter, state, values)


ENCODERS: Mapping[type[StoredWeight], Callable[[Place, Tensor], Encoded]] = {
    DenseWeight: _encode_dense,
    ScaledWeight: _encode_scaled,
    FourBitWeight: _encode_four_bit,
    OneBufferWeight: _encode_unlabelled,
    TransposedIntegers: _encode_unlabelled,
    GGUFWeight: _encode_unlabelled,
    BakedWeight: _encode_unlabelled,
    ScaledTensor: _of_tensor(encode_fp8),
    NVFP4Weight: _of_tensor(encode_nvfp4),
    MXFP8Weight: _of_tensor(encode_mxfp8),
    IntegerWeight: _of_tensor(encode_integers),
    RotatedWeight: _of_tensor(encode_integers),
    RotatedNibbles: _of_tensor(encode_integers),
}
