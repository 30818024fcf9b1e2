"""One adapter of a LoRA family as a file has it, with what it means in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters import Adapter, read_adapters

BASE_STD = 0.03
DELTA_STD = 0.003
"""Elements of one adapter's ΔW: a tenth of the base's."""

Shape = tuple[int, ...]
Change = Callable[[Tensor, float], Tensor]
"""(running rows W in float64, strength) → the rows after the adapter."""
Full = Callable[[Tensor], Tensor]
"""A(W), in float64: the weight at strength 1."""


@dataclass(frozen=True)
class Family:
    """tensors: one layer of a file, by key ending; full: what they mean."""

    tensors: dict[str, Tensor]
    full: Full

    @property
    def adapter(self) -> Adapter:
        return read_adapters({f"layer.{key}": value for key, value in self.tensors.items()})["layer"]

    def change(self, weight: Tensor, strength: float) -> Tensor:
        """`W + strength · (A(W) − W)`."""
        return weight + strength * (self.full(weight) - weight)


Make = Callable[[Shape, torch.Generator], Family]


def normal(g: torch.Generator, std: float, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g) * std


def added(tensors: dict[str, Tensor], delta: Tensor) -> Family:
    return Family(tensors, lambda weight: weight + delta.reshape(weight.shape))
