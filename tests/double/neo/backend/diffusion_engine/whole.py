"""A checkpoint in one file."""

from __future__ import annotations

from typing import Any

import safetensors.torch
from backend import utils


def save_checkpoint(self: Any, filename: str) -> str:
    """The model's configuration knows the names."""
    objects, names = self.forge_objects, self.model_config
    parts = (
        (names.process_unet_state_dict_for_saving, objects.unet.model.diffusion_model),
        (names.process_clip_state_dict_for_saving, objects.clip.cond_stage_model),
        (names.process_vae_state_dict_for_saving, objects.vae.first_stage_model),
    )
    state: dict[str, Any] = {}
    for named, part in parts:
        state |= named(utils.get_state_dict_after_quant(part))
    safetensors.torch.save_file(state, filename)
    return filename
