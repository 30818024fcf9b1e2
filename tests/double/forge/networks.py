"""LoRAs on disk, and those of the prompt on the checkpoint."""

from __future__ import annotations

import functools
from typing import Any

import torch
from backend.args import dynamic_args
from backend.patcher.lora import load_lora, model_lora_keys_clip, model_lora_keys_unet
from backend.utils import load_torch_file
from lora_folder import (
    available_network_aliases,
    available_networks,
    forbidden_network_aliases,
    list_available_networks,
    load_network,
    update_available_networks_by_names,
)
from modules import errors, sd_models

__all__ = [
    "available_network_aliases",
    "available_networks",
    "forbidden_network_aliases",
    "list_available_networks",
    "load_network",
    "load_networks",
    "loaded_networks",
    "update_available_networks_by_names",
]

loaded_networks: list[Any] = []


@functools.lru_cache(maxsize=5)
def load_lora_state_dict(filename: str) -> Any:
    """Cached by path: a file that is written anew is not read again."""
    return load_torch_file(filename, safe_load=True)


def load_lora_for_models(
    model: Any,
    clip: Any,
    lora: Any,
    strength_model: float,
    strength_clip: float,
    filename: str = "default",
    online_mode: bool = False,
) -> tuple[Any, Any]:
    unet_patches, rest = load_lora(lora, model_lora_keys_unet(model.model))
    clip_patches: Any = {}
    if clip is not None:
        clip_patches, rest = load_lora(rest, model_lora_keys_clip(clip.cond_stage_model))
    if len(rest) > 12:
        return model, clip
    if unet_patches:
        model = model.clone()
        model.add_patches(
            filename=filename, patches=unet_patches, strength_patch=strength_model, online_mode=online_mode
        )
    if clip is not None and clip_patches:
        clip = clip.clone()
        clip.add_patches(
            filename=filename, patches=clip_patches, strength_patch=strength_clip, online_mode=online_mode
        )
    return model, clip


def load_networks(
    names: Any, te_multipliers: Any = None, unet_multipliers: Any = None, dyn_dims: Any = None
) -> None:
    engine = sd_models.model_data.get_sd_model()
    if engine is None:
        return
    loaded_networks.clear()
    on_disk = [available_network_aliases.get(name) for name in names]
    if None in on_disk:
        list_available_networks()
        on_disk = [available_network_aliases.get(name) for name in names]
    for found, name in zip(on_disk, names, strict=True):
        try:
            net = load_network(name, found)
        except Exception as error:  # noqa: BLE001  as the host does
            errors.display(error, f"loading network {found.filename}")
            continue
        net.mentioned_name = name
        found.read_hash()
        loaded_networks.append(net)
    online = dynamic_args.get("online_lora", False)
    if engine.forge_objects.unet.model.storage_dtype in (torch.float32, torch.float16, torch.bfloat16):
        online = False
    targets = [
        [found.filename, unet, te, online]
        for found, unet, te in zip(on_disk, unet_multipliers, te_multipliers, strict=True)
    ]
    if engine.current_lora_hash == str(targets):
        return
    engine.current_lora_hash = str(targets)
    engine.forge_objects.unet = engine.forge_objects_original.unet
    engine.forge_objects.clip = engine.forge_objects_original.clip
    for filename, unet, te, online in targets:
        engine.forge_objects.unet, engine.forge_objects.clip = load_lora_for_models(
            engine.forge_objects.unet,
            engine.forge_objects.clip,
            load_lora_state_dict(filename),
            unet,
            te,
            filename=filename,
            online_mode=online,
        )
    engine.forge_objects_after_applying_lora = engine.forge_objects.shallow_copy()
