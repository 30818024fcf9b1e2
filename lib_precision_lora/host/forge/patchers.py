"""One pair of the host's patchers per checkpoint, kept from prompt to prompt.

The host places a model anew for every new patcher object. Keeping the objects, and exchanging what they
hold, lets a change of LoRAs or strengths move nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_precision_lora.host.loras.kept import Kept

_KEPT_STATE = ("current_device", "object_patches_backup")
"""What a patcher knows of the model's present state; a fresh clone does not."""


class KeptPatchers(Kept):
    """unet and clip: clones of the checkpoint's own, with the LoRAs of the last prompt."""

    def __init__(self, engine: Any) -> None:
        original = engine.forge_objects_original
        self.unet = original.unet.clone()
        self.clip = None if original.clip is None else original.clip.clone()

    def start(self, engine: Any) -> None:
        """As if cloned this moment, without LoRAs."""
        original = engine.forge_objects_original
        _become_clone(self.unet, original.unet)
        if self.clip is not None and original.clip is not None:
            _become_clone(self.clip.patcher, original.clip.patcher)

    def put(self, patcher: Any, source: str, patches: Mapping[Any, Any], strength: float) -> None:
        patcher.add_patches(
            filename=source,
            patches=patches,
            strength_patch=strength,
            strength_model=1.0,
            online_mode=False,
        )


def _become_clone(kept: Any, original: Any) -> None:
    fresh = vars(original.clone())
    for name in _KEPT_STATE:
        fresh.pop(name, None)
    vars(kept).update(fresh)
