"""One pair of the host's patchers per checkpoint, kept from prompt to prompt.

The host places a model anew for every new patcher object. Keeping the objects, and exchanging what they
hold, lets a change of LoRAs or strengths move nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_precision_lora.host.loras.matching import FileMatch

_KEPT_STATE = ("current_device", "object_patches_backup")
"""What a patcher knows of the model's present state; a fresh clone does not."""


class KeptPatchers:
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

    def patches(self) -> dict[int, dict[Any, Any]]:
        """What is on the patchers now, to be put back."""
        return {id(patcher): dict(patcher.lora_patches) for patcher in self._each()}

    def put_back(self, patches: Mapping[int, Mapping[Any, Any]]) -> None:
        """Take everything off that is not among these."""
        for patcher in self._each():
            patcher.lora_patches = dict(patches.get(id(patcher), {}))

    def _each(self) -> list[Any]:
        return [self.unet] if self.clip is None else [self.unet, self.clip.patcher]

    def add(self, filename: str, match: FileMatch, unet: float, te: float) -> str:
        """Put one file on top; the same file again gets a name of its own, so that it adds up.

        Returns that name, under which the patchers know it.
        """
        times = max(
            sum(str(identifier[0]).startswith(filename) for identifier in patcher.lora_patches)
            for patcher in self._each()
        )
        source = filename if not times else f"{filename} ({times + 1})"
        for patcher, patches, strength in (
            (self.unet, match.unet, unet),
            (None if self.clip is None else self.clip.patcher, match.text_encoder, te),
        ):
            if patcher is None or not patches:
                continue
            patcher.add_patches(
                filename=source,
                patches=patches,
                strength_patch=strength,
                strength_model=1.0,
                online_mode=False,
            )
        return source


def _become_clone(kept: Any, original: Any) -> None:
    fresh = vars(original.clone())
    for name in _KEPT_STATE:
        fresh.pop(name, None)
    vars(kept).update(fresh)
