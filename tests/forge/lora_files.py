"""LoRA files for the small Flux as trainers write them, and what they add in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import Target
from lib_precision_lora.storage import stored_weight

RANK = 4
ALPHA = 2.0
RATIO = 0.01
"""‖Δ‖ / ‖W‖ of a layer: that of a usual LoRA, and well below the step of a 4-bit type."""

KOHYA, DIFFUSERS = "kohya", "diffusers"
LAYOUTS = {
    KOHYA: ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_unet_final_layer_"),
    DIFFUSERS: ("transformer.",),
}
"""The names by which a layout's files know the layers; all others of the host's key map are left out."""

SUFFIXES = {KOHYA: ("lora_up.weight", "lora_down.weight"), DIFFUSERS: ("lora_B.weight", "lora_A.weight")}


def make_file(layout: str, model: nn.Module, key_map: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """A LoRA on every matrix that the layout has a name for, fused ones in parts where it splits them.

    kohya files carry an alpha; diffusers files have none.
    """
    generator = torch.Generator().manual_seed(seed)
    up_name, down_name = SUFFIXES[layout]
    state = {}
    for key, weight, target in matrices(layout, model, key_map):
        start, rows = target.rows or (0, weight.shape[0])
        spread = float(weight[start : start + rows].std())
        down = torch.randn(RANK, weight.shape[1], generator=generator)
        up = torch.randn(rows, RANK, generator=generator) * (RATIO * spread / math.sqrt(RANK))
        if layout == KOHYA:
            up = up * (RANK / ALPHA)
            state[f"{key}.alpha"] = torch.tensor(ALPHA)
        state[f"{key}.{up_name}"], state[f"{key}.{down_name}"] = up, down
    return state


def merge(
    layout: str, state: Mapping[str, Tensor], strength: float, model: nn.Module, key_map: Mapping[str, Any]
) -> None:
    """Merge a file into a dense fp32 model: the sum in float64, rounded once per file."""
    up_name, down_name = SUFFIXES[layout]
    for key, _, target in matrices(layout, model, key_map):
        scale = strength * (float(state[f"{key}.alpha"]) / RANK if layout == KOHYA else 1.0)
        delta = scale * state[f"{key}.{up_name}"].double() @ state[f"{key}.{down_name}"].double()
        parameter = model.get_parameter(target.parameter)
        start, rows = target.rows or (0, parameter.shape[0])
        merged = parameter.data.double()
        merged[start : start + rows] += delta if target.row_function is None else target.row_function(delta)
        parameter.data = merged.float()


def matrices(
    layout: str, model: nn.Module, key_map: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, Target]]:
    """The layout's names for matrices of the model, with their values, sorted: the host's order is that of
    a set."""
    for key in sorted(key for key in key_map if key.startswith(LAYOUTS[layout])):
        target = Target.parse(key_map[key])
        weight = stored_weight(model.get_parameter(target.parameter))
        if len(weight.shape) == 2:
            yield key, weight.dense(torch.float32), target
