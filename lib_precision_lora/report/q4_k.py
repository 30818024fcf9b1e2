"""A Q4_K quantizer: the `gguf` package decodes this type but cannot make it.

A super-block holds 256 values in eight sub-blocks of 32, in 144 bytes:

    d fp16, dmin fp16, 12 bytes of 6-bit scales s and minima m, 128 bytes of 4-bit codes q
    w = d · s[j] · q − dmin · m[j]                       j: the sub-block of w

Source of the layout: ggml's `block_q4_K`. The scales here are plain ranges, without ggml's search for the
best ones: a sane approximation, not the smallest error.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SUPER_BLOCK = 256
SUB_BLOCKS = 8
BLOCK_BYTES = 144
LARGEST_CODE, LARGEST_SCALE = 15, 63

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantize_q4_k(matrix: Floats) -> Bytes:
    """Q4_K bytes of a matrix. matrix: [out, in], in a multiple of 256; returns uint8 [out, in / 256 · 144].

    Raises ValueError for another width.
    """
    rows, columns = matrix.shape
    if columns % SUPER_BLOCK:
        raise ValueError(f"a Q4_K row of {columns} values is no whole number of blocks of {SUPER_BLOCK}")
    values = np.ascontiguousarray(matrix, dtype=np.float32).reshape(-1, SUB_BLOCKS, SUPER_BLOCK // SUB_BLOCKS)
    minimum = np.maximum(-values.min(axis=2), 0)
    step = np.maximum(values.max(axis=2) + minimum, 0) / LARGEST_CODE
    d, s = six_bit_scales(step)
    dmin, m = six_bit_scales(minimum)
    step, minimum = d.astype(np.float32) * s, dmin.astype(np.float32) * m
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint((values + minimum[..., None]) * inverse[..., None]).clip(0, LARGEST_CODE)
    fields = (d.view(np.uint8), dmin.view(np.uint8), pack_scales(s, m), pack_codes(codes.astype(np.uint8)))
    return np.concatenate(fields, axis=1).reshape(rows, -1)


def six_bit_scales(scales: Floats) -> tuple[npt.NDArray[np.float16], Bytes]:
    """`scales ≈ d · s`; scales: [n, 8], not negative; returns d: fp16 [n, 1] and s: uint8 [n, 8], 0 to 63."""
    d = (scales.max(axis=1, keepdims=True) / LARGEST_SCALE).astype(np.float16)
    wide = d.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > 0)
    return d, np.rint(scales * inverse).clip(0, LARGEST_SCALE).astype(np.uint8)


def pack_scales(s: Bytes, m: Bytes) -> Bytes:
    """Sixteen 6-bit numbers in twelve bytes. s, m: uint8 [n, 8]; returns uint8 [n, 12].

    Bytes 0–3 hold s[0:4], 4–7 m[0:4], 8–11 the low four bits of s[4:8] and m[4:8]; the high two bits of
    s[4:8] go above s[0:4], those of m[4:8] above m[0:4].
    """
    return np.concatenate(
        [
            s[:, :4] | (s[:, 4:] >> 4) << 6,
            m[:, :4] | (m[:, 4:] >> 4) << 6,
            (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4,
        ],
        axis=1,
    )


def pack_codes(codes: Bytes) -> Bytes:
    """Sub-blocks 2k and 2k + 1 share 32 bytes, low and high nibble. codes: [n, 8, 32] → [n, 128]."""
    return (codes[:, 0::2] + codes[:, 1::2] * np.uint8(16)).reshape(len(codes), -1)
