"""BOFT as PEFT and sd-scripts train it: inputs rotated through butterfly stages, outputs scaled.

    S = (boft_R − boft_Rᵀ) / 2        B = (I − S)(I + S)⁻¹        Mᵢ = Pᵢ · blockdiag(Bᵢ) · Pᵢᵀ
    W' = diag(s) · W · M₀ᵀ · M₁ᵀ · … · Mₖᵀ        on a convolution with columns [in · kernel]

Pᵢ sorts chunks of b / 2 inputs, within groups of 2ⁱ blocks: first those of even number, then the others.
Source: arXiv 2311.06243.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.cayley import cayley_deviation
from lib_precision_lora.adapters.input_rotation import InputRotation
from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.peft_oft import read_scale


def read_peft_boft(name: str, tensors: Mapping[str, Tensor]) -> InputRotation | None:
    """The BOFT of inputs among a layer's tensors, by role; None where there is none.

    boft_R: [stages, blocks, b, b]; boft_s: [out, 1], or [1, out] on a convolution.
    Raises `AdapterError`: another shape, stages that the blocks do not allow, NaN, inf.
    """
    if "boft_R" not in tensors:
        return None
    blocks = as_float_factor(name, "boft_R", tensors["boft_R"])
    require_finite(name, boft_R=blocks)
    if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3] or blocks.numel() == 0:
        raise AdapterError(
            f"{name}: boft_R has shape {list(blocks.shape)}, not [stages, blocks, b, b] of square blocks"
        )
    stages, count, size = blocks.shape[:3]
    if stages > 1 and (size % 2 or count % 2 ** (stages - 1)):
        raise AdapterError(
            f"{name}: boft_R has shape {list(blocks.shape)}: {count} blocks of {size} do not make "
            f"{stages} butterfly stages"
        )
    skew = (blocks.double() - blocks.double().transpose(-1, -2)) / 2.0
    transposed = cayley_deviation(skew).float()
    parts: list[Operator] = []
    for stage in reversed(range(stages)):
        inverse = stage_order(count * size, size, stage) if stage else None
        parts.append(Blocks(transposed[stage], None if inverse is None else inverse.argsort(), inverse))
    operator = parts[0] if stages == 1 else Chain(tuple(parts))
    return InputRotation(operator, count * size, size, "boft", read_scale(name, "boft_s", tensors))


def stage_order(columns: int, size: int, stage: int) -> Tensor:
    """`P` of a stage as numbers: element i of P·z is element `order[i]` of z."""
    return torch.arange(columns).view(-1, 2**stage, 2, size // 2).transpose(1, 2).flatten()
