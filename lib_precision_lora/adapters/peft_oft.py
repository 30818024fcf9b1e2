"""OFT as PEFT, OneTrainer and sd-scripts train it: the inputs of a layer are rotated, block by block.

    x' = x · R, so W' = W · Rᵀ on a linear layer        R = I + 2 Q + 2 Q² + 2 Q³ + Q⁴        (Cayley-Neumann)

Q is skew-symmetric, its upper triangle is stored: `oft_R` [count, b · (b − 1) / 2], count 1 where all blocks
share it. On a convolution the columns are [in · kernel]; OneTrainer and sd-scripts rotate the weight itself
there, W' = W · R, and PEFT merges W · Rᵀ (its forward with a kernel above 1×1 is another function, which no
weight has). `oft_R.scaled_oft` (OneTrainer): the triangle is divided by 2 · √(b − 1).

A file does not say which parametrization it was trained with. Read is the truncated series of five terms,
the default of all three. What that means for the others, θ the largest singular value of Q:
    PEFT's exact transform (`use_cayley_neumann=False`) turns the other way: it is the rotation of the
    negated triangle, but for θ⁴ beside a change of 2θ: 5e-4 of the change at θ = 0.1, 7 % at θ = 0.5
    (θ is 0.1 for blocks of 32 and elements of 0.01). Strength −1 comes near to such a file
    the series before PEFT 0.18 ended in 2 Q⁴: off by θ⁴ as well
    COFT holds the triangle to a norm before each step of the training; it is taken as it stands

PEFT 0.12 and 0.13 stored `oft_r` [count, b, b] and rotated outputs, W' = Rᵀ · W; 0.14 to 0.15 rotated inputs
and scaled outputs with `oft_s`, W' = diag(s) · W · Rᵀ; both R = (I − S)(I + S)⁻¹, S = (oft_r − oft_rᵀ) / 2.

Source: arXiv 2306.07280 (OFT), 2506.19847 (OFTv2).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.cayley import (
    cayley_deviation,
    triangle_size,
    truncated_deviation,
    unpacked_skew,
)
from lib_precision_lora.adapters.input_rotation import InputRotation
from lib_precision_lora.adapters.oft import OFT
from lib_precision_lora.adapters.operators import Blocks

PEFT_PREFIX = "base_model."
"""Begins every name in a file of PEFT's own."""


def read_peft_oft(name: str, tensors: Mapping[str, Tensor]) -> InputRotation | OFT | None:
    """The OFT of inputs among a layer's tensors, by role; None where there is none.

    Raises `AdapterError`: no triangle, no square blocks, NaN, inf, a DoRA scale beside it.
    """
    if "oft_R" in tensors:
        return _read_packed(name, tensors)
    if "oft_r" in tensors:
        return _read_square(name, tensors)
    return None


def _read_packed(name: str, tensors: Mapping[str, Tensor]) -> InputRotation:
    packed = as_float_factor(name, "oft_R", tensors["oft_R"])
    require_finite(name, oft_R=packed)
    size = triangle_size(packed.shape[1]) if packed.ndim == 2 else None
    if size is None or packed.shape[0] == 0:
        raise AdapterError(
            f"{name}: oft_R has shape {list(packed.shape)}, not [blocks, b·(b−1)/2] of triangles of square "
            "blocks"
        )
    if "dora_scale" in tensors:
        raise AdapterError(
            f"{name}: OFT with a DoRA scale is not supported; without its scale it is another adapter"
        )
    scaled = "scaled_oft" in tensors and bool(tensors["scaled_oft"].any())
    divisor = 2.0 * (size - 1) ** 0.5 if scaled else 1.0
    turns = truncated_deviation(unpacked_skew(packed.double() / divisor, size)).float()
    columns = None if packed.shape[0] == 1 else packed.shape[0] * size
    operator = Blocks(turns.transpose(-1, -2))
    on_convolution = None if name.startswith(PEFT_PREFIX) else Blocks(turns)
    return InputRotation(operator, columns, size, "oft", on_convolution=on_convolution)


def _read_square(name: str, tensors: Mapping[str, Tensor]) -> InputRotation | OFT:
    blocks = as_float_factor(name, "oft_r", tensors["oft_r"])
    require_finite(name, oft_r=blocks)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.numel() == 0:
        raise AdapterError(
            f"{name}: oft_r has shape {list(blocks.shape)}, not [blocks, b, b] of square blocks"
        )
    skew = (blocks.double() - blocks.double().transpose(-1, -2)) / 2.0
    operator = Blocks(cayley_deviation(skew).float())
    count, size = blocks.shape[:2]
    turned = None if count == 1 else count * size
    if "oft_s" not in tensors:
        return OFT(operator, turned, size, "oft")
    return InputRotation(operator, turned, size, "oft", read_scale(name, "oft_s", tensors))


def read_scale(name: str, role: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """`v = s − 1` of the outputs in fp32: [out]; None where there is none, or where it is 0 throughout."""
    if role not in tensors:
        return None
    scale = as_float_factor(name, role, tensors[role])
    require_finite(name, **{role: scale})
    change = (scale.double() - 1.0).flatten().float()
    return change if change.any() else None
