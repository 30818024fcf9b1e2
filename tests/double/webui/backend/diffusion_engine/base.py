"""What a checkpoint consists of."""

from __future__ import annotations

from typing import Any


class ForgeObjects:
    """The patchers of one checkpoint that are in use."""

    def __init__(self, unet: Any, clip: Any, vae: Any, clipvision: Any) -> None:
        self.unet, self.clip, self.vae, self.clipvision = unet, clip, vae, clipvision

    def shallow_copy(self) -> ForgeObjects:
        return ForgeObjects(self.unet, self.clip, self.vae, self.clipvision)
