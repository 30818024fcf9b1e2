"""A checkpoint in one file."""

from __future__ import annotations

from typing import Any

import safetensors.torch
from backend import utils


def save_checkpoint(self: Any, filename: str) -> str:
    objects = self.forge_objects
    parts = {
        "model.diffusion_model.": objects.unet.model.diffusion_model,
        "text_encoders.": objects.clip.cond_stage_model,
        "vae.": objects.vae.first_stage_model,
    }
    state: dict[str, Any] = {}
    for prefix, part in parts.items():
        state |= utils.get_state_dict_after_quant(part, prefix=prefix)
    safetensors.torch.save_file(state, filename)
    return filename
