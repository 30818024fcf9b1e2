"""A tiny model of a host's own class: in fp32 on the CPU, with random weights and a fixed input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], Tensor]
Sizes = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Tiny:
    """model: what the host's patcher holds; run: its output, on an input that is always the same;
    key_map: the host's names for its parameters, in a dictionary of its own."""

    model: nn.Module
    run: Run
    key_map: Mapping[str, Any]


def random_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations near 1: matrices of spread 1/√in, norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, old in model.state_dict().items():
        noise = torch.randn(old.shape, generator=generator)
        if not old.is_floating_point():
            state[name] = old
        elif old.ndim > 1 and "embed" not in name and "shared" not in name:
            state[name] = noise / math.sqrt(math.prod(old.shape[1:]))
        elif old.ndim > 1:
            state[name] = noise
        else:
            center = 0.0 if name.endswith("bias") else 1.0
            state[name] = center + 0.2 * noise
    return state


def values(*shape: int) -> Tensor:
    """Activations without pattern, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
