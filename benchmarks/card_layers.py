"""The layers that are counted: single ones, and all that a LoRA file changes in one pass of a model.

Names and shapes are those of `tests.memory.checkpoints`, tokens those of `memory.architecture`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib_precision_lora.memory.architecture import FLUX_DEV, SD15, SDXL, Architecture, Request
from lib_precision_lora.memory.flows import Counts, flow_of
from lib_precision_lora.names.unet import unet_blocks
from tests.memory.checkpoints import Shapes, flux, sd15_unet, sdxl_unet

BF16, FP16 = torch.bfloat16, torch.float16
CHANGED = ("transformer_blocks", "proj_in", "proj_out", "double_blocks", "single_blocks")
"""Of these a file of kohya's trainer has the matrices and 1×1 convolutions, if it is told nothing else."""


@dataclass(frozen=True, slots=True)
class Layer:
    """weight: its shape; given: that of the input; count: how many such layers a pass has."""

    name: str
    weight: tuple[int, ...]
    given: tuple[int, ...]
    dtype: torch.dtype
    count: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.weight[2:]

    def module(self, device: torch.device) -> nn.Module:
        """The layer without values that mean anything."""
        rows, columns, *kernel = self.weight
        if kernel:
            module: nn.Module = nn.Conv2d(
                columns, rows, kernel[0], padding=kernel[0] // 2, bias=False, device=device, dtype=self.dtype
            )
        else:
            module = nn.Linear(columns, rows, bias=False, device=device, dtype=self.dtype)
        return module.requires_grad_(False)

    def input(self, device: torch.device) -> Tensor:
        return torch.empty(self.given, dtype=self.dtype, device=device)


def _linear(name: str, columns: int, rows: int, given: tuple[int, ...], dtype: torch.dtype) -> Layer:
    return Layer(f"{name} {columns}→{rows}", (rows, columns), (*given, columns), dtype)


def _conv(columns: int, rows: int, side: int, kernel: int) -> Layer:
    name = f"SDXL {kernel}×{kernel} {columns}→{rows}"
    return Layer(name, (rows, columns, kernel, kernel), (2, columns, side, side), FP16)


LAYERS = (
    _linear("Flux", 3072, 3072, (1, 4608), BF16),
    _linear("Flux", 3072, 12288, (1, 4096), BF16),
    _linear("Flux", 3072, 21504, (1, 4608), BF16),
    _linear("SDXL", 640, 640, (2, 4096), FP16),
    _linear("SDXL", 1280, 1280, (2, 1024), FP16),
    _linear("SDXL", 1280, 10240, (2, 1024), FP16),
    _conv(320, 320, 128, 3),
    _conv(1280, 1280, 32, 3),
    _conv(640, 320, 128, 1),
)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a model: an image of this side in pixels, with guidance where the model has it."""

    name: str
    architecture: Architecture
    shapes: Callable[[], Shapes]
    side: int

    def layers(self) -> tuple[Layer, ...]:
        """The layers that a file changes, those of equal shapes as one."""
        architecture, shapes = self.architecture, self.shapes()
        request = Request(self.side, self.side, 1 + architecture.guided, architecture.text_tokens)
        levels = {block.name: block.level for block in unet_blocks(shapes)}
        counts: Counter[Layer] = Counter()
        for parameter, shape in shapes.items():
            name, _, attribute = parameter.rpartition(".")
            if attribute != "weight" or len(shape) < 2 or not any(part in name for part in CHANGED):
                continue
            flow = flow_of(architecture.family, name, levels, Counts())
            tokens = request.tokens_per_image(flow)
            side = request.width // 8 >> flow.level
            given = (
                (request.images, shape[1], side, side) if shape[2:] else (request.images, tokens, shape[1])
            )
            counts[Layer(self.name, shape, given, FP16 if architecture.half else BF16)] += 1
        return tuple(replace(layer, count=count) for layer, count in counts.items())


PASSES: Mapping[str, Pass] = {
    "flux": Pass("Flux dev, 1024²", FLUX_DEV, flux, 1024),
    "sdxl": Pass("SDXL, 1024², guided", SDXL, sdxl_unet, 1024),
    "sd15": Pass("SD 1.5, 512², guided", SD15, sd15_unet, 512),
}
