"""LoRA files to patches, and patches into weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from backend import memory_management, utils
from backend.patcher.merging import extra_weight_calculators, merge_lora_to_weight
from torch import Tensor, nn

__all__ = ["LoraLoader", "extra_weight_calculators", "load_lora", "merge_lora_to_weight"]

PAIRS = (
    (".lora_up.weight", ".lora_down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora.up.weight", ".lora.down.weight"),
)
LOHA = (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
LOKR = (".lokr_w1", ".lokr_w2")


def load_lora(
    lora: Mapping[str, Tensor], to_load: Mapping[str, Any]
) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    """Patches by target, and the tensors that went into none; a missing half is a KeyError."""
    patches: dict[Any, Any] = {}
    used: set[str] = set()

    def take(key: str) -> Tensor:
        used.add(key)
        return lora[key]

    for name, target in to_load.items():
        alpha = take(f"{name}.alpha").item() if f"{name}.alpha" in lora else None
        magnitude = take(f"{name}.dora_scale") if f"{name}.dora_scale" in lora else None
        for up, down in PAIRS:
            if name + up in lora:
                patches[target] = ("lora", (take(name + up), take(name + down), alpha, None, magnitude))
        if name + LOHA[0] in lora:
            first_up, first_down, second_up, second_down = (take(name + key) for key in LOHA)
            patches[target] = (
                "loha",
                (first_up, first_down, alpha, second_up, second_down, None, None, magnitude),
            )
        if name + LOKR[0] in lora:
            first, second = (take(name + key) for key in LOKR)
            patches[target] = ("lokr", (first, second, alpha, None, None, None, None, None, magnitude))
        if f"{name}.diff" in lora:
            patches[target] = ("diff", (take(f"{name}.diff"),))
        if f"{name}.diff_b" in lora:
            patches[target.removesuffix(".weight") + ".bias"] = ("diff", (take(f"{name}.diff_b"),))
        if f"{name}.set_weight" in lora:
            patches[target] = ("set", (take(f"{name}.set_weight"),))
    return patches, {key: value for key, value in lora.items() if key not in used}


def model_lora_keys_clip(model: nn.Module, key_map: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    """The default is shared by all calls and leaks from one model to the next, as the host's does."""
    for key in model.state_dict():
        layer = key.removesuffix(".weight")
        if key != layer and key.startswith("clip_l.transformer.text_model.encoder.layers."):
            name = layer.removeprefix("clip_l.transformer.")
            key_map[f"lora_te_{name.replace('.', '_')}"] = key
            key_map[f"lora_te1_{name.replace('.', '_')}"] = key
            key_map[f"text_encoder.{name}"] = key
    return key_map


def model_lora_keys_unet(model: nn.Module, key_map: dict[str, Any] = {}) -> dict[str, Any]:  # noqa: B006
    """As `model_lora_keys_clip`."""
    for key in model.state_dict():
        layer = key.removesuffix(".weight")
        if key.startswith("diffusion_model."):
            key_map[layer] = key
            if key != layer:
                key_map[f"lora_unet_{layer.removeprefix('diffusion_model.').replace('.', '_')}"] = key
    return key_map


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
