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

from lib_precision_lora.host.loras.kept import Kept


@dataclass(slots=True, eq=False)
class Prompted:
    """Stands for a patcher of the host, with the prompt's LoRAs: identifier → parameter → entries, as
    `division.HostPatches`."""

    model: nn.Module
    load_device: Any
    lora_patches: dict[Any, Any] = field(default_factory=dict)


class KeptPatches(Kept):
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

    def put_back(self, patches: Mapping[int, Mapping[Any, Any]]) -> None:
        """In the same dictionaries, which the host's table holds."""
        for patcher in self.each():
            former = dict(patches.get(id(patcher), {}))
            patcher.lora_patches.clear()
            patcher.lora_patches.update(former)

    def put(self, patcher: Any, source: str, patches: Mapping[Any, Any], strength: float) -> None:
        patcher.lora_patches[source, strength] = _entries(patches, strength)


def _entries(patches: Mapping[Any, Any], strength: float) -> dict[str, list[list[Any]]]:
    """Parameter → [strength, value, base factor, offset, function], in the order of the file."""
    found: dict[str, list[list[Any]]] = {}
    for key, value in patches.items():
        name, offset, function = (key, None, None) if isinstance(key, str) else (*key, None, None)[:3]
        found.setdefault(name, []).append([strength, value, 1.0, offset, function])
    return found
