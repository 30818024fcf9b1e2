"""What tests of merged layers share."""

from __future__ import annotations

import torch
from torch import nn

from tests.branch.hosts import Holder
from tests.branch.recipes import generator
from tests.families import BASE_STD, Family

MODULES = ("embedding", "linear", "second", "conv")
"""What is merged of `Mixed`."""


def holder_of(layer: nn.Module, dtype: torch.dtype) -> Holder:
    layer.weight.data.copy_(BASE_STD * torch.randn(layer.weight.shape, generator=generator(4)))
    return Holder(layer.to(dtype))


def item(made: Family, strength: float = 1.0) -> tuple[str, dict[str, object], float]:
    return "file", {"layer.weight": made.adapter}, strength
