"""bitsandbytes' 4-bit weights, decoded from the format's definition in float64: right on every CPU.

    W0[i] = code[nibble i] · absmax[⌊i / B⌋]              nibble 2k is the high half of byte k, 2k + 1 the low
    absmax[k] = code₂[q[k]] · scale[⌊k / B₂⌋] + offset    where the statistics are nested

i counts the values of the whole weight, whatever its rows are. W0, absmax and the product in it are fp32
numbers of the format: each is rounded to fp32 once. A product of two fp32 numbers is exact in float64, so
that these are the correctly rounded values, to the bit.

bitsandbytes itself is right only where every row is a whole number of blocks, or odd. Its kernel for CPUs
with AVX-512 (0.50.2) begins a block with each row, `absmax[⌊r · n / B⌋ + ⌊j / B⌋]` for value j of row r: that
is the definition where B divides n, and another weight elsewhere. Odd rows it leaves to torch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from statistics import NormalDist
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FP4_CODE = [sign * value / 12 for sign in (1, -1) for value in (0, 1 / 16, 8, 12, 4, 6, 2, 3)]
"""Three bits of exponent and mantissa, scaled to a largest value of 1; the first bit is the sign."""

Doubles = npt.NDArray[np.float64]


def nf4_code() -> list[float]:
    """Quantiles of the normal distribution, 8 above 0 and 7 below, scaled to a largest value of 1.

    Source: QLoRA, arXiv 2305.14314, appendix E; the outermost probability is the mean of 31/32 and 29/30.
    """
    outermost = (31 / 32 + 29 / 30) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    return sorted(value / max(above) for value in (*above, 0.0, *below))


def four_bit_values(packed: Tensor, state: Any) -> Tensor:
    """W0 in fp32, of the shape that the state says; packed: the bytes in any type, two values each."""
    nibbles = _nibbles(packed, prod(state.shape))
    owners = np.arange(nibbles.size) // int(state.blocksize)
    values = _rounded(_doubles(state.code)[nibbles] * _absmax(state)[owners])
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(state.shape))


def decoded_by_bitsandbytes(packed: Tensor, state: Any) -> Tensor:
    """Its own decode, where it is right: of rows of whole blocks. Eagerly, or it may compile."""
    assert state.shape[-1] % state.blocksize == 0, "bitsandbytes decodes such rows wrongly on some CPUs"
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(packed, state)


def four_bit_values_of_a_wrong_kernel(packed: Tensor, state: Any) -> Tensor:
    """What the kernel for AVX-512 gives for rows of even length, on whatever CPU: see above."""
    columns = int(state.shape[-1])
    numbers = np.arange(prod(state.shape))
    block_size, absmax = int(state.blocksize), _absmax(state)
    owners = numbers // columns * columns // block_size + numbers % columns // block_size
    if columns % 2:
        owners = numbers // block_size
    values = _doubles(state.code)[_nibbles(packed, numbers.size)] * absmax[owners]
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(state.shape)).to(state.dtype)


def wrong_bitsandbytes(packed: Tensor, quant_state: Any, *_: object, **__: object) -> Tensor:
    """In the place of `bitsandbytes.functional.dequantize_4bit`."""
    return four_bit_values_of_a_wrong_kernel(packed, quant_state)


def install_wrong_bitsandbytes(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let bitsandbytes decode 4-bit weights wrongly in this process; replace: as `setattr` does."""
    replace(bnb, "dequantize_4bit", wrong_bitsandbytes)


def _nibbles(packed: Tensor, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes, high half first."""
    data = packed.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.stack((data >> 4, data & 15), axis=1).reshape(-1)[:count]


def _absmax(state: Any) -> Doubles:
    if not state.nested:
        return _doubles(state.absmax)
    numbers = state.absmax.cpu().numpy()
    owners = np.arange(numbers.size) // int(state.state2.blocksize)
    centred = _rounded(_doubles(state.state2.code)[numbers] * _doubles(state.state2.absmax)[owners])
    return _rounded(centred + _doubles(state.offset))


def _doubles(values: Tensor) -> Doubles:
    wide: Doubles = values.detach().cpu().double().numpy()
    return wide


def _rounded(values: Doubles) -> Doubles:
    """To the nearest fp32 numbers."""
    return values.astype(np.float32).astype(np.float64)
