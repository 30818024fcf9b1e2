"""A patcher: one model, and what is patched on it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from backend import memory_management, utils
from backend.patcher.lora import LoraLoader
from torch import nn


class ModelPatcher:
    """Clones share the model and its `LoraLoader`."""

    def __init__(
        self,
        model: nn.Module,
        load_device: Any,
        offload_device: Any,
        size: int = 0,
        current_device: Any = None,
    ) -> None:
        self.model = model
        self.size = size or memory_management.module_size(model)
        self.lora_patches: dict[Any, Any] = {}
        self.object_patches: dict[str, Any] = {}
        self.object_patches_backup: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.load_device, self.offload_device = load_device, offload_device
        self.current_device = offload_device if current_device is None else current_device
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader: LoraLoader = model.lora_loader

    def clone(self) -> ModelPatcher:
        other = type(self)(self.model, self.load_device, self.offload_device, self.size, self.current_device)
        other.lora_patches = self.lora_patches.copy()
        other.object_patches = self.object_patches.copy()
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def is_clone(self, other: Any) -> bool:
        return hasattr(other, "model") and self.model is other.model

    def add_patches(
        self,
        *,
        filename: str,
        patches: Any,
        strength_patch: float = 1.0,
        strength_model: float = 1.0,
        online_mode: bool = False,
    ) -> set[Any]:
        """Patches whose parameter the model has; those of one identifier replace the former ones."""
        names = {name for name, _ in self.model.named_parameters()}
        mine: dict[str, list[Any]] = {}
        taken = set()
        for target, value in patches.items():
            name, offset, function = ((target,) if isinstance(target, str) else (*target,)) + (None,) * (
                2 if isinstance(target, str) else 3 - len(target)
            )
            if name in names:
                taken.add(target)
                mine.setdefault(name, []).append([strength_patch, value, strength_model, offset, function])
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = mine
        return taken

    def has_online_lora(self) -> bool:
        return any(online for _, _, _, online in self.lora_patches)

    def refresh_loras(self) -> None:
        self.lora_loader.refresh(lora_patches=self.lora_patches, offload_device=self.offload_device)

    def memory_required(self, input_shape: Any) -> float:
        return self.model.memory_required(input_shape=input_shape)

    def forge_patch_model(self, target_device: torch.device | None = None) -> nn.Module:
        for name, item in self.object_patches.items():
            self.object_patches_backup.setdefault(name, utils.get_attr(self.model, name))
            utils.set_attr_raw(self.model, name, item)
        if target_device is not None:
            self.model.to(target_device)
            self.current_device = target_device
        return self.model

    def forge_unpatch_model(self, target_device: torch.device | None = None) -> None:
        if target_device is not None:
            self.model.to(target_device)
            self.current_device = target_device
        for name, item in self.object_patches_backup.items():
            utils.set_attr_raw(self.model, name, item)
        self.object_patches_backup = {}
