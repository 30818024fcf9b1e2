"""LoRA files to patches, and patches into a weight."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lora_families import DELTAS, decomposed, model_lora_keys_clip, model_lora_keys_unet, read_patches
from torch import Tensor

__all__ = ["load_lora", "merge_lora_to_weight", "model_lora_keys_clip", "model_lora_keys_unet"]

logger = logging.getLogger("lora")


class WeightAdapter:
    """One family's patch of one layer. name: the family's; weights: its content."""

    def __init__(self, name: str, weights: tuple[Any, ...]) -> None:
        self.name, self.weights = name, weights

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any, function: Any
    ) -> Tensor:
        """In place; a delta of another size than the weight is logged and left out."""
        delta, scale, magnitude = DELTAS[self.name](self.weights, weight)
        if delta.numel() != weight.numel():
            logger.error("ERROR %s %s: %s beside %s", self.name, key, delta.shape, weight.shape)
            return weight
        delta = function(scale * delta.reshape(weight.shape))
        if magnitude is not None:
            return decomposed(weight, delta, strength, magnitude)
        weight += strength * delta
        return weight


def load_lora(
    lora: Mapping[str, Tensor], to_load: Mapping[str, Any]
) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """As `read_patches`; a family's patch is an object."""
    return read_patches(lora, to_load, WeightAdapter)


def string_to_seed(data: str) -> int:
    """The same for the same name."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(data))


@torch.inference_mode()
def merge_lora_to_weight(
    patches: Any, weight: Tensor, key: str, computation_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Every patch (strength, value, base factor, offset, function, online) in turn, in place."""
    for strength, value, base_factor, offset, function, _ in patches:
        part = weight if offset is None else weight.narrow(*offset)
        if base_factor != 1.0:
            part *= base_factor
        change = function or (lambda rows: rows)
        if isinstance(value, WeightAdapter):
            value.calculate_weight(part, key, strength, base_factor, offset, change)
            continue
        kind, content = ("diff", value) if len(value) == 1 else value
        if kind == "set":
            part.copy_(content[0])
        elif kind != "diff":
            raise ValueError(f'"{key}" of type "{kind}" is not recognized...')
        elif content[0].shape != part.shape:
            logger.warning("SHAPE MISMATCH %s WEIGHT NOT MERGED", key)
        else:
            part += change(strength * content[0].to(part))
    return weight
