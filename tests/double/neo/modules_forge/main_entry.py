"""The controls on top of the page: checkpoint, and "Diffusion in Low Bits"."""

from __future__ import annotations

from typing import Any

import torch
from backend.args import dynamic_args
from modules import sd_models, shared

forge_unet_storage_dtype_options: dict[str, tuple[Any, bool]] = {
    "Automatic": (None, False),
    "Automatic (fp16 LoRA)": (None, True),
    "float8-e4m3fn": (torch.float8_e4m3fn, False),
    "float8-e4m3fn (fp16 LoRA)": (torch.float8_e4m3fn, True),
    "float8-e5m2": (torch.float8_e5m2, False),
    "float8-e5m2 (fp16 LoRA)": (torch.float8_e5m2, True),
}


def refresh_model_loading_parameters(*, refresh: bool = True) -> None:
    from modules import processing

    if not refresh:
        return
    storage, online = forge_unet_storage_dtype_options.get(
        shared.opts.forge_unet_storage_dtype, (None, False)
    )
    sd_models.model_data.forge_loading_parameters = {
        "checkpoint_info": sd_models.select_checkpoint(),
        "additional_modules": shared.opts.forge_additional_modules,
        "unet_storage_dtype": storage,
    }
    dynamic_args.online_lora = online or _is_gguf(sd_models.select_checkpoint())
    processing.need_global_unload = True


def _is_gguf(checkpoint: Any) -> bool:
    """LoRAs cannot be merged into it."""
    return checkpoint is not None and str(checkpoint.filename).lower().endswith("gguf")


def checkpoint_change(ckpt_name: str, preset: str | None, save: bool = True, refresh: bool = True) -> bool:
    """True where it is another one."""
    present = sd_models.get_closet_checkpoint_match(shared.opts.data.get("sd_model_checkpoint", ""))
    if sd_models.get_closet_checkpoint_match(ckpt_name) == present:
        return False
    shared.opts.set("sd_model_checkpoint", ckpt_name)
    refresh_model_loading_parameters(refresh=refresh)
    return True
