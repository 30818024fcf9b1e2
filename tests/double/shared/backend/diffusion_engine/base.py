"""What a checkpoint consists of."""

from __future__ import annotations

from typing import Any

import safetensors.torch
from backend import utils
from backend.diffusion_engine.whole import save_checkpoint


class ForgeObjects:
    """The patchers of one checkpoint that are in use."""

    def __init__(self, unet: Any, clip: Any, vae: Any, clipvision: Any) -> None:
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)


class ForgeDiffusionEngine:
    """A checkpoint that is loaded."""

    forge_objects: ForgeObjects

    def save_unet(self, filename: str) -> str:
        state = utils.get_state_dict_after_quant(self.forge_objects.unet.model.diffusion_model)
        safetensors.torch.save_file(state, filename)
        return filename

    save_checkpoint = save_checkpoint
