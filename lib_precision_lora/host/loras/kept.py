"""The LoRAs of a prompt on the models of one checkpoint, in the host's format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lib_precision_lora.host.loras.matching import FileMatch


class Kept(ABC):
    """unet, clip: patchers, or what stands for them, with `.model`, `.load_device` and `.lora_patches`.

    `clip` has its own at `.patcher`, and is None without text encoders.
    """

    unet: Any
    clip: Any

    @abstractmethod
    def start(self, engine: Any) -> None:
        """As the checkpoint has them at this moment, without LoRAs."""

    @abstractmethod
    def put(self, patcher: Any, source: str, patches: Mapping[Any, Any], strength: float) -> None:
        """Put patches under this name on one of them, by the keys of the host's `add_patches`."""

    def each(self) -> list[Any]:
        """One for each model."""
        return [self.unet] if self.clip is None else [self.unet, self.clip.patcher]

    def patches(self) -> dict[int, dict[Any, Any]]:
        """What is on them now, to be put back."""
        return {id(patcher): dict(patcher.lora_patches) for patcher in self.each()}

    def put_back(self, patches: Mapping[int, Mapping[Any, Any]]) -> None:
        """Take everything off that is not among these."""
        for patcher in self.each():
            patcher.lora_patches = dict(patches.get(id(patcher), {}))

    def add(self, filename: str, match: FileMatch, unet: float, te: float) -> str:
        """Put one file on top; the same file again gets a name of its own, so that it adds up.

        Returns that name, under which the patchers know it.
        """
        times = max(
            sum(str(identifier[0]).startswith(filename) for identifier in patcher.lora_patches)
            for patcher in self.each()
        )
        source = filename if not times else f"{filename} ({times + 1})"
        parts = ((match.unet, unet), (match.text_encoder, te))
        for patcher, (patches, strength) in zip(self.each(), parts, strict=False):
            if patches:
                self.put(patcher, source, patches, strength)
        return source
