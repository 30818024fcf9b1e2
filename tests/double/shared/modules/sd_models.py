"""The checkpoint that is loaded, those on disk, and when one is loaded anew."""

from __future__ import annotations

import gc
from typing import Any

from backend import memory_management
from backend.args import dynamic_args
from modules import shared

checkpoints_list: dict[str, Any] = {}
checkpoint_aliases: dict[str, Any] = {}


class SdModelData:
    """Holds one checkpoint."""

    def __init__(self) -> None:
        self.sd_model: Any = None
        self.forge_loading_parameters: dict[str, Any] = {}
        self.forge_hash = ""

    def get_sd_model(self) -> Any:
        return self.sd_model

    def set_sd_model(self, v: Any) -> None:
        self.sd_model = v


model_data = SdModelData()


def get_closet_checkpoint_match(search_string: Any) -> Any:
    return checkpoint_aliases.get(search_string)


def select_checkpoint() -> Any:
    return checkpoint_aliases.get(shared.opts.sd_model_checkpoint)


def forge_loader(sd: str, additional_state_dicts: Any = None) -> Any:
    """The checkpoint of a file; which files there are is the tests' to say."""
    raise ValueError(f"Failed to recognize model type of {sd}!")


def forge_model_reload() -> tuple[Any, bool]:
    """Skipped where the parameters are those of the last time that it was loaded."""
    current_hash = str(model_data.forge_loading_parameters)
    if model_data.forge_hash == current_hash:
        return model_data.sd_model, False
    if model_data.sd_model:
        model_data.sd_model = None
        memory_management.unload_all_models()
        memory_management.soft_empty_cache()
        gc.collect()
    checkpoint_info = model_data.forge_loading_parameters["checkpoint_info"]
    dynamic_args["forge_unet_storage_dtype"] = model_data.forge_loading_parameters.get("unet_storage_dtype")
    sd_model = forge_loader(
        checkpoint_info.filename, model_data.forge_loading_parameters.get("additional_modules", [])
    )
    sd_model.extra_generation_params, sd_model.comments = {}, []
    sd_model.sd_checkpoint_info = checkpoint_info
    model_data.set_sd_model(sd_model)
    model_data.forge_hash = current_hash
    return sd_model, True
