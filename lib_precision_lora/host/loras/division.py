"""The host's patches of a model, divided: what runs beside the base, and what goes the host's own way."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lib_precision_lora.adapters import (
    Adapter,
    AdapterError,
    DoRA,
    ForgePatch,
    Target,
    channels_of,
    from_forge_patch,
    row_order,
)
from lib_precision_lora.branch import Patch, PatchError
from lib_precision_lora.branch.forward.shadow import has_dense_stand_in
from lib_precision_lora.branch.session.sites import Site, find_site
from lib_precision_lora.host.loras.matching import PutAside, nothing_aside, shape_at, shape_of_rows
from lib_precision_lora.storage import StorageError, stored_weight

logger = logging.getLogger("lib_precision_lora")

HostPatches = Mapping[Any, Mapping[str, Sequence[Sequence[Any]]]]
"""The host's `lora_patches`: identifier → parameter → [strength, value, base factor, offset, function]."""

Place = tuple[str, str]
"""A parameter, and which part of it: of a fused one, a file may patch each part by itself."""


class Division:
    """A parameter all of whose patches are understood is ours; any other goes the host's own way, whole.

    What is made of a patch is kept for as long as it is among those that are divided. stock_dora_norm:
    whether a DoRA's norm is that of the base alone; aside: what the host has put aside of the model.
    """

    def __init__(self, stock_dora_norm: bool = False, aside: PutAside = nothing_aside) -> None:
        self._aside = aside
        self.stock_dora_norm = stock_dora_norm
        self._made: dict[int, tuple[Any, Adapter | None]] = {}

    def take_norm_of(self, stock: bool) -> None:
        if stock != self.stock_dora_norm:
            self.stock_dora_norm = stock
            self.clear()

    def clear(self) -> None:
        self._made.clear()

    def divide(
        self, model: nn.Module, host_patches: HostPatches
    ) -> tuple[list[Patch], dict[Any, Mapping[str, Sequence[Sequence[Any]]]]]:
        """Our patches in the host's order, and the host's part in its own format."""
        adapters = {}
        for patches in host_patches.values():
            for name, stack in patches.items():
                for entry in stack:
                    adapters[id(entry[1])] = entry[1], self._adapter(name, entry[1])
        self._made = adapters
        layer = functools.cache(functools.partial(_layer, self._aside, model))
        foreign = {
            name
            for patches in host_patches.values()
            for name, stack in patches.items()
            if not all(self._understood(layer(name), name, entry) for entry in stack)
        }
        ours = [
            Patch(
                source_of(identifier),
                _target(name, offset, function),
                self._made[id(value)][1],  # type: ignore[arg-type]
                float(strength),
                float(base_factor),
                _widens(value),
            )
            for identifier, patches in host_patches.items()
            for name, stack in patches.items()
            if name not in foreign
            for strength, value, base_factor, offset, function in stack
        ]
        theirs = {
            identifier: {name: stack for name, stack in patches.items() if name in foreign}
            for identifier, patches in host_patches.items()
        }
        return ours, {identifier: patches for identifier, patches in theirs.items() if patches}

    def suspects(self, theirs: HostPatches) -> list[str]:
        """The sources of what goes the host's own way, those with a patch that only the host understands
        last."""
        foreign = {source_of(identifier): False for identifier in theirs}
        for identifier, patches in theirs.items():
            values = (entry[1] for stack in patches.values() for entry in stack)
            foreign[source_of(identifier)] |= any(self._made[id(value)][1] is None for value in values)
        return sorted(foreign, key=lambda source: foreign[source])

    def _adapter(self, name: str, value: Any) -> Adapter | None:
        if id(value) in self._made:
            return self._made[id(value)][1]
        try:
            adapter = from_forge_patch(name, value)
            if self.stock_dora_norm and isinstance(adapter, DoRA):
                return dataclasses.replace(adapter, base_norm=True)
            return adapter
        except Exception as error:
            logger.exception("a patch of another extension is left to the WebUI: %s", error)
            return None

    def _understood(self, layer: Layer | None, name: str, entry: Sequence[Any]) -> bool:
        _, value, _, offset, function = entry
        adapter = self._made[id(value)][1]
        if adapter is None or layer is None:
            return False
        site, whole = layer
        try:
            target = _target(name, offset, function)
            shape = shape_of_rows(whole, target)
            if _widens(value):
                channels_of(adapter, shape)
            else:
                adapter.check(shape)
            if site.kind == "shadow" and not has_dense_stand_in(
                site.parameter, stored_weight(site.parameter, site.module)
            ):
                return False
        except (AdapterError, StorageError, AttributeError, AssertionError):
            return False
        return target.row_function is None or row_order(target.row_function, shape[0]) is not None


Layer = tuple[Site, tuple[int, ...]]
"""A parameter's place, and its shape."""


def _layer(aside: PutAside, model: nn.Module, name: str) -> Layer | None:
    """None where the model has no such parameter, or one of a format that is not understood."""
    try:
        site = find_site(model, name)
        return site, shape_at(model, site, name, aside)
    except (AdapterError, StorageError, AttributeError, AssertionError):
        return None


def _widens(value: Any) -> bool:
    """Whether it came from a file whose input channels are not the layer's."""
    return isinstance(value, ForgePatch) and value.widens


def _target(name: str, offset: Any, function: Any) -> Target:
    return Target.parse(name if offset is None and function is None else (name, offset, function))


def unreadable(theirs: HostPatches) -> list[PatchError]:
    """What the host could not merge beside a patch of its own kind on the same layer."""
    problems = {}
    for identifier, patches in theirs.items():
        for name, stack in patches.items():
            if any(isinstance(entry[1], ForgePatch) and not entry[1].host_readable for entry in stack):
                source = source_of(identifier)
                reason = f"layer {name}: the WebUI has a patch of its own there, which this kind cannot join"
                problems.setdefault(source, PatchError(f"{source}: {reason}", source))
    return list(problems.values())


def only(
    host_patches: HostPatches, sources: Collection[str]
) -> dict[Any, Mapping[str, Sequence[Sequence[Any]]]]:
    """The patches of these sources, in the host's order."""
    return {key: patches for key, patches in host_patches.items() if source_of(key) in sources}


def source_of(identifier: Any) -> str:
    """The file that one of the host's patch identifiers stands for."""
    return str(identifier[0]) if isinstance(identifier, tuple) and identifier else str(identifier)


def strengths_of(
    host_patches: HostPatches, left_out: Collection[str | None] = ()
) -> dict[str, dict[Place, float]]:
    """Source → the strength of each of its patches, but for the sources that are left out (None: all)."""
    found: dict[str, dict[Place, float]] = {}
    for identifier, patches in host_patches.items():
        source = source_of(identifier)
        if source in left_out or None in left_out:
            continue
        here = found.setdefault(source, {})
        for name, stack in patches.items():
            for strength, _, _, offset, _ in stack:
                here[name, str(offset)] = here.get((name, str(offset)), 0.0) + float(strength)
    return found


def flat(host_patches: HostPatches) -> tuple[object, ...]:
    """Everything that decides the result, comparable: values by identity, numbers by value."""
    return tuple(
        (str(identifier), name, id(value), strength, base_factor, offset, function)
        for identifier, patches in host_patches.items()
        for name, stack in patches.items()
        for strength, value, base_factor, offset, function in stack
    )
