"""Values -> what a host's state dict holds for a parameter: the inverse of decoding, with one rounding.

encoded = encode(module, "weight", parameter, values)
encoded.entries                  # {"weight": …, "weight.absmax": …}, beside the module's other entries
encoded.weight.rows(0, 128)      # what whoever loads them decodes

dense, FP8   the nearest value of the type
scaled       the nearest multiple of `scale_weight`; where values leave its range, a larger scale
NF4, FP4     `bnb4_encode.py`
GGUF         dense, in the type in which its layer computes: a state dict cannot say what a GGUF tensor's
             bytes mean
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
from .fp8 import FP8_KINDS, ScaledWeight, scaled_weight
from .gguf import GGUFWeight
from .gguf_baked import COMPUTE_TYPES, BakedWeight
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


def _encode_gguf(place: Place, values: Tensor) -> Encoded:
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
    own, dtype = plain(place.module.scale_weight), stored.stored.dtype  # type: ignore[arg-type]
    limit = torch.finfo(dtype).max
    scale = stored.scale.to(values.device, torch.float32)
    rows = values.reshape(scale.numel(), -1)
    largest = rows.abs().amax(1).view(scale.shape)
    if not bool(largest.isfinite().all()):
        raise StorageError("a value of it would not be finite; lower the strengths of the LoRAs")
    too_small = largest > limit * scale.abs()
    entries: dict[str, Tensor] = {}
    if bool(too_small.any()):
        written = torch.where(too_small, largest / limit, scale).to(own.dtype).reshape(own.shape)
        entries["scale_weight"], scale = written, written.to(torch.float32).reshape(scale.shape)
        if not bool((scale[too_small].isfinite() & (scale[too_small] != 0)).all()):
            raise StorageError(
                f"it needs a scale of {float(largest.max()) / limit:.3g}, which {own.dtype} does not have; "
                "lower the strengths of the LoRAs, or store the checkpoint in a wider type"
            )
    quotient = values / torch.where(scale == 0, torch.ones_like(scale), scale)
    rounded = quotient.clamp_(-limit, limit).to(dtype).contiguous()
    entries[place.attribute] = rounded
    return Encoded(entries, scaled_weight(rounded, scale, stored.kind))


def _encode_four_bit(place: Place, values: Tensor) -> Encoded:
    state = getattr(place.parameter, "quant_state", None) or getattr(place.module, "quant_state", None)
    return encode_four_bit(place.attribute, place.parameter, state, values)


ENCODERS: Mapping[type[StoredWeight], Callable[[Place, Tensor], Encoded]] = {
    DenseWeight: _encode_dense,
    ScaledWeight: _encode_scaled,
    FourBitWeight: _encode_four_bit,
    GGUFWeight: _encode_gguf,
    BakedWeight: _encode_gguf,
}
