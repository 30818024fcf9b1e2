"""LoRA files to patches, and patches into weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backend import memory_management, utils
from backend.patcher.merging import extra_weight_calculators, merge_lora_to_weight
from lora_families import model_lora_keys_clip, model_lora_keys_unet, read_patches
from torch import Tensor, nn

__all__ = [
    "LoraLoader",
    "extra_weight_calculators",
    "load_lora",
    "merge_lora_to_weight",
    "model_lora_keys_clip",
    "model_lora_keys_unet",
]


def load_lora(
    lora: Mapping[str, Tensor], to_load: Mapping[str, Any]
) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """As `read_patches`; a family's patch is its name with its content."""
    return read_patches(lora, to_load, lambda kind, content: (kind, content))


class LoraLoader:
    """One per model object: merges patches into its weights and takes them out again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.backup: dict[str, Tensor] = {}
        self.online_backup: list[nn.Module] = []
        self.loaded_hash = str([])

    @torch.inference_mode()
    def refresh(
        self,
        lora_patches: Any,
        offload_device: torch.device = torch.device("cpu"),  # noqa: B008
        force_refresh: bool = False,
    ) -> None:
        hashes = str(list(lora_patches.keys()))
        if hashes == self.loaded_hash and not force_refresh:
            return
        memory_management.signal_empty_cache = True
        for layer in set(self.online_backup):
            del layer.forge_online_loras
        self.online_backup = []
        for key, value in self.backup.items():
            utils.set_attr_raw(self.model, key, utils.tensor2parameter(value))
        self.backup = {}
        stacks: dict[tuple[str, bool], list[Any]] = {}
        for (_, _, _, online), patches in lora_patches.items():
            for key, stack in patches.items():
                stacks[key, online] = stacks.get((key, online), []) + stack
        for (key, online), stack in stacks.items():
            try:
                parent, name, weight = utils.get_attr_with_parent(self.model, key)
            except AttributeError as error:
                raise ValueError(f"Wrong LoRA Key: {key}") from error
            if online:
                if not hasattr(parent, "forge_online_loras"):
                    parent.forge_online_loras = {}
                parent.forge_online_loras[name] = stack
                self.online_backup.append(parent)
                continue
            self.backup.setdefault(key, weight.to(device=offload_device))
            merged = merge_lora_to_weight(stack, weight, key)
            utils.set_attr_raw(self.model, key, nn.Parameter(merged, requires_grad=False))
        self.loaded_hash = hashes
