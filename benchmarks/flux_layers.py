"""The linear layers of one double and one single block of Flux at their true width, and LoRAs for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Target, read_adapters
from lib_precision_lora.branch import Patch

HIDDEN = 3072
SHAPES: Mapping[str, tuple[int, int]] = {
    "img_mod": (6 * HIDDEN, HIDDEN),
    "img_attn_qkv": (3 * HIDDEN, HIDDEN),
    "img_attn_proj": (HIDDEN, HIDDEN),
    "img_mlp_in": (4 * HIDDEN, HIDDEN),
    "img_mlp_out": (HIDDEN, 4 * HIDDEN),
    "linear1": (7 * HIDDEN, HIDDEN),
    "linear2": (HIDDEN, 5 * HIDDEN),
    "modulation": (3 * HIDDEN, HIDDEN),
}
"""[out, in]; the text stream of a double block has the layers of the image stream once more."""

ONE_TOKEN = ("img_mod", "modulation")
"""Layers that see one vector instead of the tokens."""


class Linear(nn.Module):
    """Makes its output and computes nothing; a weight of one row stands for a base of any storage."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        super().__init__()
        weight = torch.zeros(1, 1, dtype=torch.bfloat16, device=device).expand(rows, columns)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.weight.shape[0])


def flux_layers(device: torch.device) -> nn.ModuleDict:
    return nn.ModuleDict({name: Linear(*shape, device) for name, shape in SHAPES.items()})


def inputs(name: str, tokens: int, device: torch.device) -> Tensor:
    """What a layer is given: bf16, [1, tokens, in]."""
    count = 1 if name in ONE_TOKEN else tokens
    return torch.ones(1, count, SHAPES[name][1], dtype=torch.bfloat16, device=device)


def loras(files: int, rank: int) -> list[Patch]:
    """Files of plain LoRAs in bf16 for every layer."""
    g = torch.Generator().manual_seed(0)
    patches = []
    for number in range(files):
        tensors = {}
        for name, (rows, columns) in SHAPES.items():
            for role, shape in (("up", (rows, rank)), ("down", (rank, columns))):
                values = torch.rand(shape, generator=g, dtype=torch.float32) - 0.5
                tensors[f"{name}.lora_{role}.weight"] = (0.01 * values).to(torch.bfloat16)
        for name, adapter in read_adapters(tensors).items():
            patches.append(Patch(f"file {number}", Target(f"{name}.weight"), adapter, 0.5))
    return patches
