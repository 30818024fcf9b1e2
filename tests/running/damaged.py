"""LoRA files that cannot be applied, each in its own way, made from a sound one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def not_finite(place: str) -> Damage:
    """One NaN in the first factor whose name has this beginning."""

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        key = next(key for key in tensors if key.startswith(place) and key.endswith("lora_up.weight"))
        factor = tensors[key].clone()
        factor.view(-1)[0] = float("nan")
        return {**tensors, key: factor}

    return damage


def without_one_down(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    missing = next(key for key in tensors if key.endswith("lora_down.weight"))
    return {key: value for key, value in tensors.items() if key != missing}


def wider_text(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross attention over 2048 features, as in SDXL."""
    return {
        key: torch.ones(len(value), 2048).half() if "attn2_to_k.lora_down" in key else value
        for key, value in tensors.items()
    }


def for_flux(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    return {f"{name}.lora_down.weight": torch.ones(4, 3072), f"{name}.lora_up.weight": torch.ones(9216, 4)}


DAMAGES = {
    "nan_in_model": not_finite("lora_unet_"),
    "nan_in_text_encoder": not_finite("lora_te_"),
    "half": without_one_down,
    "misfit": wider_text,
    "foreign": for_flux,
}


def truncate(whole: Path, part: Path) -> None:
    """Half a file, as a broken download leaves it."""
    content = whole.read_bytes()
    part.write_bytes(content[: len(content) // 2])
