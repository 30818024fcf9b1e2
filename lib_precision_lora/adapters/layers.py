"""The keys of a file, grouped by the layer that they resolve to.

Trainers and converters write the tensors of one layer under names that differ in dots, underscores or
prefixes (`…_attn1_to_k.lora_up.weight` beside `…_attn1.to_k.lora_magnitude_vector`): grouped by their text, a
DoRA would fall into a LoRA and a magnitude that belongs to nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lib_precision_lora.adapters.target import Target
from lib_precision_lora.names.endings import by_module, meaning_of
from lib_precision_lora.names.layouts import aliases, bare_name, text_encoder_path, whole_norms

PARTS_OF_A_NAME = 4
"""A key has at most so many parts behind its layer's name, as in `….lora_magnitude_vector.default.weight`."""

LOOKED_AT = 1000
LONGEST_NAME = 512
"""No layer has a longer one; a hostile file may."""


@dataclass(slots=True)
class LayerKeys:
    """One layer of a file.

    name: as its first key has it; target: where it belongs; leading_rows: whether the adapter is for the
    first rows of a fused weight; roles: what a tensor is → its key; layouts: the writers of these keys;
    rest: keys of this layer that are no part of it: a role that is there already, the layer under a second
    name, or an ending that nobody knows.
    """

    name: str
    target: Target
    leading_rows: bool = False
    roles: dict[str, str] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    def take(self, names: Mapping[str, tuple[str, str]]) -> bool:
        """Add what another name has for this layer, key → (role, layout); False where a role is there."""
        if any(role in self.roles for role, _ in names.values()):
            return False
        for key, (role, layout) in names.items():
            if role in self.roles:
                self.rest.append(self.roles[role])
            self.roles[role], self.layouts[role] = key, layout
        return True


def layers_of(
    keys: Iterable[str], key_map: Mapping[str, Any] | None
) -> tuple[tuple[LayerKeys, ...], tuple[str, ...]]:
    """The layers in the order of their first keys, and the keys that belong to none.

    key_map: as in `read_adapters`; without one, two names are of one layer where they differ in dots,
    underscores and prefixes alone. Two names that both have the same part are then taken for two layers.
    """
    keys = tuple(keys)
    whole = whole_norms(keys)
    places = _Places(key_map)
    layers: dict[Hashable, LayerKeys] = {}
    stray: dict[str, list[str]] = {}
    for name, members in by_module(keys).items():
        meanings = {key: meaning_of(name, key, whole) for key in members}
        known = {key: meaning for key, meaning in meanings.items() if meaning[0]}
        place = places.find(name)
        if place is None or not known:
            stray[name] = members
            continue
        layer = layers.setdefault(places.identity(place), LayerKeys(name, *place))
        if not layer.take(known):
            if key_map is None:
                layer = layers.setdefault(name, LayerKeys(name, *place))
                layer.take(known)
            else:
                layer.rest.extend(known)
        layer.rest.extend(meanings.keys() - known.keys())
    unknown: list[str] = []
    for name, members in stray.items():
        owner = _owner(name, layers, places)
        (unknown if owner is None else owner.rest).extend(members)
    return tuple(layers.values()), tuple(unknown)


Place = tuple[Target, bool]
"""Where a module belongs, and whether the adapter is for the first rows of it."""


class _Places:
    """Finds the places of names in a key map, each once."""

    def __init__(self, key_map: Mapping[str, Any] | None) -> None:
        self._key_map = key_map
        self._found: dict[str, Place | None] = {}

    def find(self, name: str) -> Place | None:
        if name not in self._found:
            self._found[name] = self._look_up(name)
        return self._found[name]

    def identity(self, place: Place) -> Hashable:
        """Equal for two names of one layer."""
        return place if self._key_map is not None else text_encoder_path(bare_name(place[0].parameter))

    def _look_up(self, name: str) -> Place | None:
        if self._key_map is None:
            return Target(name), False
        for alias in aliases(name):
            if alias.name in self._key_map:
                return Target.parse(self._key_map[alias.name]), alias.leading_rows
        return None


def _owner(name: str, layers: Mapping[Hashable, LayerKeys], places: _Places) -> LayerKeys | None:
    """The layer of which a name is a part: that of the longest beginning, up to a dot, that is a layer's."""
    for _ in range(PARTS_OF_A_NAME):
        place = places.find(name) if len(name) <= LONGEST_NAME else None
        if place is not None:
            layer = layers.get(name) or layers.get(places.identity(place))
            if layer is not None:
                return layer
        name = name.rpartition(".")[0]
        if not name:
            break
    return None


def endings_of_known_layers(keys: Iterable[str], key_maps: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """What stands behind the names of layers in keys whose beginning is a layer's; each ending once.

    Only the first keys are looked at: of a file that is not understood, they tell what it is.
    """
    endings: dict[str, None] = {}
    places = [_Places(key_map) for key_map in key_maps]
    for key in islice(keys, LOOKED_AT):
        name = key
        for _ in range(PARTS_OF_A_NAME):
            name = name.rpartition(".")[0]
            if name and len(name) <= LONGEST_NAME and any(known.find(name) is not None for known in places):
                endings[key[len(name) :]] = None
                break
    return tuple(endings)
