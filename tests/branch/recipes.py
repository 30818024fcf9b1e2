"""Adapters by name, each made from raw tensors, with its float64 oracle beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from lib_precision_lora.adapters import Adapter, Target, read_adapters
from lib_precision_lora.branch import Patch
from tests.oracles import Change, RowFunction, Step, added, lora_delta, replaced

BASE_STD = 0.03
DELTA_STD = 0.003
"""Elements of one adapter's ΔW: a tenth of the base's."""


@dataclass(frozen=True)
class Recipe:
    """One adapter for a weight of one shape. delta: ΔW in float64; None for `set`, which is `value`."""

    adapter: Adapter
    delta: Tensor | None
    value: Tensor | None = None

    def change(self, function: RowFunction | None = None) -> Change:
        if self.delta is not None:
            return added(self.delta, function)
        assert self.value is not None
        return replaced(self.value if function is None else function(self.value))

    def patch(
        self,
        parameter: str,
        strength: float = 1.0,
        rows: tuple[int, int] | None = None,
        function: RowFunction | None = None,
        factor: float = 1.0,
    ) -> tuple[Patch, Step]:
        """What the session is given, and what the oracle is given, for the same application."""
        target = Target(parameter, rows, function)
        return (
            Patch("file", target, self.adapter, strength, factor),
            Step(self.change(function), strength, rows, factor),
        )


Shape = tuple[int, ...]
Make = Callable[[Shape, torch.Generator], Recipe]


def noise(shape: Shape, generator: torch.Generator, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator) * std


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read_one(tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a file of one layer, "layer"."""
    (adapter,) = read_adapters({f"layer{key}": value for key, value in tensors.items()}).values()
    return adapter


def lora(rank: int, alpha: float | None, dtype: torch.dtype, shape: Shape, g: torch.Generator) -> Recipe:
    scale = 1.0 if alpha is None else alpha / rank
    std = math.sqrt(DELTA_STD / (abs(scale) * math.sqrt(rank)))
    ones = (1,) * (len(shape) - 2)
    up = noise((shape[0], rank, *ones), g, std).to(dtype)
    down = noise((rank, *shape[1:]), g, std).to(dtype)
    tensors = {".lora_up.weight": up, ".lora_down.weight": down}
    if alpha is not None:
        tensors[".alpha"] = torch.tensor(alpha)
    return Recipe(read_one(tensors), lora_delta(up, down, alpha, shape))


def tucker(rank: int, alpha: float, dtype: torch.dtype, shape: Shape, g: torch.Generator) -> Recipe:
    """LoCon with a core; for a linear weight the core has a kernel of one position."""
    kernel = shape[2:] or (1,)
    ones = (1,) * len(kernel)
    std = (DELTA_STD / (alpha / rank * rank)) ** (1 / 3)
    up = noise((shape[0], rank, *ones), g, std).to(dtype)
    mid = noise((rank, rank, *kernel), g, std).to(dtype)
    down = noise((rank, shape[1], *ones), g, std).to(dtype)
    tensors = {
        ".lora_up.weight": up,
        ".lora_mid.weight": mid,
        ".lora_down.weight": down,
        ".alpha": torch.tensor(alpha),
    }
    return Recipe(read_one(tensors), lora_delta(up, down, alpha, shape, mid))


def diff(dtype: torch.dtype, shape: Shape, g: torch.Generator) -> Recipe:
    value = noise(shape, g, DELTA_STD).to(dtype)
    return Recipe(read_one({".diff": value}), value.double())


def assign(dtype: torch.dtype, shape: Shape, g: torch.Generator) -> Recipe:
    value = noise(shape, g, BASE_STD).to(dtype)
    return Recipe(read_one({".set_weight": value}), None, value.double())


RECIPES: Mapping[str, Make] = {
    "lora-rank-1": partial(lora, 1, 1.0, torch.float32),
    "lora-rank-4-without-alpha": partial(lora, 4, None, torch.float32),
    "lora-rank-8-fp16": partial(lora, 8, 4.0, torch.float16),
    "lora-rank-16-bf16": partial(lora, 16, 1.0, torch.bfloat16),
    "lora-rank-3-alpha-24": partial(lora, 3, 24.0, torch.bfloat16),
    "lora-rank-4-fp8": partial(lora, 4, 4.0, torch.float8_e4m3fn),
    "tucker-rank-4": partial(tucker, 4, 2.0, torch.float32),
    "tucker-rank-2-fp16": partial(tucker, 2, 2.0, torch.float16),
    "diff-fp32": partial(diff, torch.float32),
    "diff-bf16": partial(diff, torch.bfloat16),
    "set-fp16": partial(assign, torch.float16),
}
EIGHT_MIXED = (
    "lora-rank-16-bf16",
    "diff-bf16",
    "lora-rank-4-without-alpha",
    "tucker-rank-4",
    "lora-rank-8-fp16",
    "lora-rank-1",
    "lora-rank-3-alpha-24",
    "diff-fp32",
)


@lru_cache(maxsize=256)
def recipe(name: str, shape: Shape, seed: int = 0) -> Recipe:
    return RECIPES[name](shape, generator(1000 * seed + list(RECIPES).index(name)))
