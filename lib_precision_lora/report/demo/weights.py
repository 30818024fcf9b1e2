"""The values of the demo: a small transformer with true-to-life weights, and a LoRA for it.

W ~ N(0, 0.03²), 1 column in 200 six times as large; rounded to bf16, as published checkpoints are
Δ = alpha / rank · up · down with ‖Δ‖ = 0.01 · ‖W‖ in every layer; factors in fp16, as in kohya's files
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 0.03
OUTLIER_SHARE, OUTLIER_FACTOR = 0.005, 6.0
RANK, ALPHA = 16, 8.0
DELTA_RATIO = 0.01


@dataclass(frozen=True, slots=True)
class DemoShape:
    """A stack of Flux's single-stream blocks. hidden: a multiple of 256, the block size of K-quants."""

    hidden: int = 512
    blocks: int = 2
    tokens: int = 256

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name → (out, in), with Flux's names."""
        width = self.hidden
        layers = {
            "modulation.lin": (3 * width, width),
            "linear1": (7 * width, width),
            "linear2": (width, 5 * width),
        }
        return {
            f"single_blocks.{index}.{layer}": shape
            for index in range(self.blocks)
            for layer, shape in layers.items()
        }

    @property
    def parameters(self) -> int:
        """Weights of all linear layers."""
        return sum(rows * columns for rows, columns in self.linears.values())


def base_weights(shape: DemoShape, seed: int = 0) -> dict[str, Tensor]:
    """Parameter name → bf16 values: `.weight` [out, in] and `.bias` [out] of every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, (rows, columns) in shape.linears.items():
        matrix = torch.randn(rows, columns, generator=generator) * SPREAD
        outliers = torch.randperm(columns, generator=generator)[: max(1, round(columns * OUTLIER_SHARE))]
        matrix[:, outliers] *= OUTLIER_FACTOR
        weights[f"{name}.weight"] = matrix.to(torch.bfloat16)
        weights[f"{name}.bias"] = (torch.randn(rows, generator=generator) * SPREAD).to(torch.bfloat16)
    return weights


def lora_weights(weights: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """A LoRA in kohya's layout for every 2-d weight: `.lora_up.weight`, `.lora_down.weight`, `.alpha`."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Tensor] = {}
    for parameter, matrix in weights.items():
        if matrix.ndim != 2:
            continue
        rows, columns = matrix.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator)
        norm = (ALPHA / RANK * up @ down).norm()
        name = kohya_name(parameter)
        factors[f"{name}.lora_up.weight"] = (up * DELTA_RATIO * matrix.float().norm() / norm).half()
        factors[f"{name}.lora_down.weight"] = down.half()
        factors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return factors


def kohya_name(parameter: str) -> str:
    """`single_blocks.0.linear1.weight` → `lora_unet_single_blocks_0_linear1`."""
    return "lora_unet_" + parameter.removesuffix(".weight").replace(".", "_")
