"""Values -> the entries of a `QuantizedTensor` in its host's state dict: the nearest values of its format.

    weight, weight_scale[, weight_scale_2]

FP8 and int8   the nearest multiple of the scale; where values leave its range, a larger scale. ConvRot in
               its own basis, where distances are the same
NVFP4          scale of a block: max|W| / 6 in the tensor's scale, to the nearest E4M3; then the nearest codes
MXFP8          scale of a block: the smallest power of two with max|W| ≤ 448 · scale; then the nearest codes

Nothing is rounded stochastically.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import block_count
from ..encoded import Encoded
from ..fitted_scale import divided, fitted_scale
from ..weight import StorageError, flat_bytes, plain
from .block_scaled import E2M1, E8M0_BIAS, BlockScaledWeight, MXFP8Weight, NVFP4Weight, tiled
from .integers import IntegerWeight, RotatedNibbles, RotatedWeight, rotated
from .recognise import ScaledTensor

VALUES_PER_CALL = 1 << 22
"""Bounds the temporary tensors, several times as large."""

LARGEST_E2M1, LARGEST_E4M3, LARGEST_EXPONENT = 6.0, 448.0, 254
E2M1_MIDDLES = tuple((low + high) / 2 for low, high in pairwise(E2M1))


def encode_fp8(attribute: str, parameter: Any, stored: ScaledTensor, values: Tensor) -> Encoded:
    """values: fp32 or fp64, [out, ...]. Raises StorageError for values that are not finite."""
    limit = torch.finfo(stored.stored.dtype).max
    scale, written = fitted_scale(values, stored.scale, plain(parameter._params.scale), limit)
    codes = divided(values, scale).clamp_(-limit, limit).to(stored.stored.dtype).contiguous()
    weight = dataclasses.replace(stored, shape=tuple(values.shape), stored=codes, scale=scale)
    return Encoded(_entries(attribute, codes, written), weight)


def encode_integers(attribute: str, parameter: Any, stored: IntegerWeight, values: Tensor) -> Encoded:
    """values: fp32 or fp64, [out, ...]. Raises StorageError for values that are not finite, and for another
    number of columns that is no multiple of the group that is rotated."""
    shape, limit = tuple(values.shape), 7 if isinstance(stored, RotatedNibbles) else 127
    if isinstance(stored, RotatedWeight):
        if shape[1] % stored.group:
            raise StorageError(
                f"its {shape[1]} columns are no multiple of the {stored.group} that {stored.kind} rotates "
                "together; store the checkpoint in another type"
            )
        values = rotated(values, stored.group)
    scale, written = fitted_scale(values, stored.scale, plain(parameter._params.scale), limit, limit + 0.5)
    codes = divided(values, scale).round_().clamp_(-limit, limit).to(torch.int8).contiguous()
    if isinstance(stored, RotatedNibbles):
        nibbles = codes.view(torch.uint8) & 15
        codes = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(stored.codes.dtype)
    weight = dataclasses.replace(stored, shape=shape, codes=codes, scale=scale)
    return Encoded(_entries(attribute, codes, written), weight)


def encode_nvfp4(attribute: str, parameter: Any, stored: NVFP4Weight, values: Tensor) -> Encoded:
    """values: fp32 or fp64, [out, in]. Raises StorageError for values that are not finite."""
    own = plain(parameter._params.scale)
    scale, written = fitted_scale(values, stored.tensor_scale.reshape(1, 1), own, LARGEST_E2M1 * LARGEST_E4M3)
    middles = torch.tensor(E2M1_MIDDLES, device=values.device)
    codes, scales = [], []
    for blocks in _row_blocks(values, stored):
        largest = divided(blocks.abs().amax(2) / LARGEST_E2M1, scale)
        block_scale = largest.clamp_(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
        step = block_scale.to(torch.float32) * scale
        quotient = divided(blocks, step[..., None]).to(torch.float32)
        numbers = torch.bucketize(quotient.abs(), middles, out_int32=True).to(torch.uint8)
        numbers.masked_fill_((step == 0)[..., None], 0).bitwise_or_(quotient.signbit().to(torch.uint8) << 3)
        numbers = numbers.flatten(1)
        codes.append(numbers[:, 0::2] << 4 | numbers[:, 1::2])
        scales.append(block_scale.view(torch.uint8))
    tensor_scale = stored.tensor_scale if written is None else written
    entries, flat = _block_entries(attribute, parameter._params.block_scale, codes, scales)
    if written is not None:
        entries[f"{attribute}_scale_2"] = written
    weight = dataclasses.replace(
        stored,
        shape=tuple(values.shape),
        codes=entries[attribute],
        scales=flat,
        tensor_scale=tensor_scale.to(values.device),
    )
    return Encoded(entries, weight)


def encode_mxfp8(attribute: str, parameter: Any, stored: MXFP8Weight, values: Tensor) -> Encoded:
    """values: fp32 or fp64, [out, in]. Raises StorageError for values that are not finite."""
    limit = torch.finfo(stored.codes.dtype).max
    codes, scales = [], []
    for blocks in _row_blocks(values, stored):
        largest = blocks.abs().amax(2).double()
        if not bool(largest.isfinite().all()):
            raise StorageError("a value of it would not be finite; lower the strengths of the LoRAs")
        mantissa, power = torch.frexp(largest / limit)  # mantissa · 2^power, mantissa in [0.5, 1)
        exponent = (power - (mantissa <= 0.5).to(power)).clamp_(-E8M0_BIAS, LARGEST_EXPONENT - E8M0_BIAS)
        quotient = (blocks / torch.exp2(exponent.double())[..., None]).to(torch.float32)
        codes.append(quotient.clamp_(-limit, limit).to(stored.codes.dtype).flatten(1))
        exponent.masked_fill_(largest == 0, -E8M0_BIAS)
        scales.append((exponent + E8M0_BIAS).to(torch.uint8))
    entries, flat = _block_entries(attribute, parameter._params.scale, codes, scales)
    weight = dataclasses.replace(stored, shape=tuple(values.shape), codes=entries[attribute], scales=flat)
    return Encoded(entries, weight)


def _row_blocks(values: Tensor, stored: BlockScaledWeight) -> list[Tensor]:
    """Rows by rows as `[rows, k, block_size]`, padded to as many rows as are stored, and to whole blocks."""
    size = stored.block_size
    rows = max(stored.codes.shape[0], values.shape[0])
    columns = block_count(values.shape[1], size) * size
    whole = pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0])).view(rows, -1, size)
    return list(torch.split(whole, max(1, VALUES_PER_CALL // columns)))


def _entries(attribute: str, codes: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    return {attribute: codes} | ({} if scale is None else {f"{attribute}_scale": scale})


def _block_entries(
    attribute: str, own: Tensor, codes: list[Tensor], scales: list[Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The entries, and the scales' bytes flat. own: the host's block scales, whose type they take."""
    joined = torch.cat(codes).contiguous()
    tiles = tiled(torch.cat(scales))
    written = tiles.view(plain(own).dtype)
    return {attribute: joined, f"{attribute}_scale": written}, flat_bytes(tiles)
