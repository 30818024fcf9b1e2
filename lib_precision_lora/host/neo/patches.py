"""The LoRAs of a prompt beside Neo's patchers: they never enter `ModelPatcher.patches`.

A patcher of Neo whose `patches` change gets a new `patches_uuid`, and its model is then taken apart, merged
and placed anew. So ours lie in a table by model, and Neo's patchers stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn

from lib_precision_lora.host.loras.matching import FileMatch


@dataclass(slots=True, eq=False)
class Prompted:
    """Stands for a patcher of the host, with the prompt's LoRAs: identifier → parameter → entries, as
    `division.HostPatches`."""

    model: nn.Module
    load_device: Any
    lora_patches: dict[Any, Any] = field(default_factory=dict)


class KeptPatches:
    """unet, clip: what stands for the checkpoint's patchers (`clip.patcher`, None without text encoders)."""

    def __init__(self, engine: Any) -> None:
        original = engine.forge_objects_original
        self.unet = Prompted(original.unet.model, original.unet.load_device)
        self.clip = None
        if original.clip is not None:
            patcher = original.clip.patcher
            self.clip = SimpleNamespace(patcher=Prompted(patcher.model, patcher.load_device))

    def start(self, engine: Any) -> None:
        self.put_back({})

    def patches(self) -> dict[int, dict[Any, Any]]:
        return {id(each): dict(each.lora_patches) for each in self.each()}

    def put_back(self, patches: Mapping[int, Mapping[Any, Any]]) -> None:
        for each in self.each():
            each.lora_patches = dict(patches.get(id(each), {}))

    def each(self) -> list[Prompted]:
        """One for each model."""
        return [self.unet] if self.clip is None else [self.unet, self.clip.patcher]

    def add(self, filename: str, match: FileMatch, unet: float, te: float) -> str:
        """The same file again gets a name of its own, so that it adds up."""
        times = max(
            sum(str(identifier[0]).startswith(filename) for identifier in each.lora_patches)
            for each in self.each()
        )
        source = filename if not times else f"{filename} ({times + 1})"
        for each, patches, strength in (
            (self.unet, match.unet, unet),
            (None if self.clip is None else self.clip.patcher, match.text_encoder, te),
        ):
            if each is not None and patches:
                each.lora_patches[source, strength] = _entries(patches, strength)
        return source


def _entries(patches: Mapping[Any, Any], strength: float) -> dict[str, list[list[Any]]]:
    """Parameter → [strength, value, base factor, offset, function], in the order of the file."""
    found: dict[str, list[list[Any]]] = {}
    for key, value in patches.items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]
        found.setdefault(name, []).append([strength, value, 1.0, offset, function])
    return found
