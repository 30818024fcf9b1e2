"""The layer of a checkpoint that a module of a LoRA file means, by the names of the host's model of it."""

from __future__ import annotations

from dataclasses import dataclass

from lib_precision_lora.memory.checkpoint import MODEL, Checkpoint, Layer
from lib_precision_lora.names.key_map import Rows, every_name
from lib_precision_lora.names.layouts import aliases, bare_name, text_encoder_path
from lib_precision_lora.names.models import DENOISER
from lib_precision_lora.names.text_encoders import ADAPTER, ADAPTER_HOST, ADAPTER_PATH, HOSTS

_ROOTS = {
    MODEL: DENOISER,
    ADAPTER: f"{ADAPTER_HOST}.{ADAPTER_PATH}",
    **{encoder: f"{host}.transformer." for encoder, host in HOSTS.items()},
}
"""A component → how a host's names of its parameters begin."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [start, stop) of a layer of a component."""

    component: str
    layer: Layer
    start: int
    stop: int


class Places:
    """Finds the place that a name means; made once per checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._owners = {
            f"{_ROOTS[name]}{layer.parameter}": (name, layer)
            for name, component in checkpoint.components.items()
            if name in _ROOTS
            for layer in component.every_layer
        }
        self._places: dict[str, Rows] = {}
        for name, rows in every_name(self._owners, self._shape_of):
            self._places.setdefault(name, rows)

    def find(self, name: str) -> Place | None:
        """name: of a module in a LoRA file; None where no layer of this checkpoint is known by it."""
        for alias in aliases(name):
            found = self._places.get(alias.name)
            if found is None:
                continue
            component, layer = self._owners[found.parameter]
            start, length = found.rows or (0, 3 * layer.columns if alias.leading_rows else layer.rows)
            return Place(component, layer, start, start + length)
        return None

    def _shape_of(self, parameter: str) -> tuple[int, ...]:
        _, layer = self._owners[parameter]
        return layer.rows, layer.columns, *layer.kernel


def of_text_encoder(name: str, place: Place | None) -> bool:
    """Whether a module belongs to a text encoder, by its place, or by its name where it has none."""
    if place is not None:
        return place.component != MODEL
    return text_encoder_path(bare_name(name))[0] is not None
