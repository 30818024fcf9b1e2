"""A session that follows the patches of one of the host's models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lib_precision_lora.adapters import Adapter, AdapterError, Target, from_forge_patch, row_order
from lib_precision_lora.branch import Compute, Patch, PatchError, PatchSession
from lib_precision_lora.branch.sites import find_site
from lib_precision_lora.host.matching import target_shape
from lib_precision_lora.storage import StorageError

logger = logging.getLogger("lib_precision_lora")

HostPatches = Mapping[Any, Mapping[str, Sequence[Sequence[Any]]]]
"""The host's `lora_patches`: identifier → parameter → [strength, value, base factor, offset, function]."""


class HostedSession:
    """Keeps one model's branches equal to what the host's patch dictionary says.

    A parameter all of whose patches are understood is ours; any other goes the host's own way, whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._session = PatchSession(model)
        self._signature: object = None
        self._values: list[Any] = []
        self._adapters: dict[int, tuple[Any, Adapter | None]] = {}
        self._theirs: object = None

    def follow(
        self,
        model: nn.Module,
        host_patches: HostPatches,
        compute: Compute,
        merge: Callable[[HostPatches], None],
    ) -> list[PatchError]:
        """Bring the model to these patches; nothing happens where nothing has changed.

        merge: the host's own way, given the patches that are not ours. Returns the reason for each source
        that could not be applied and was left out.
        """
        signature = compute, *_flat(host_patches)
        if signature == self._signature:
            return []
        self._signature = None
        ours, theirs = self._divide(model, host_patches)
        if _flat(theirs) != self._theirs:
            self._session.clear()
            self._theirs = None
        merge(theirs)
        self._theirs = _flat(theirs)
        problems = self._apply(ours, compute)
        self._signature = signature
        self._values = [
            entry[1] for patches in host_patches.values() for stack in patches.values() for entry in stack
        ]
        return problems

    def clear(self) -> None:
        self._session.clear()
        self._signature = self._theirs = None
        self._values.clear()
        self._adapters.clear()

    @property
    def attached(self) -> tuple[str, ...]:
        return self._session.attached

    def _apply(self, patches: list[Patch], compute: Compute) -> list[PatchError]:
        """Attach as many sources as can be; each that fails is left out whole."""
        problems: list[PatchError] = []
        while True:
            try:
                self._session.apply_patches(patches, compute)
                return problems
            except PatchError as error:
                problems.append(error)
                remaining = [patch for patch in patches if patch.source != error.source]
                if error.source is None or len(remaining) == len(patches):
                    remaining = []
                patches = remaining

    def _divide(self, model: nn.Module, host_patches: HostPatches) -> tuple[list[Patch], HostPatches]:
        """Our patches in the host's order, and the host's part in its own format."""
        adapters = {}
        for patches in host_patches.values():
            for name, stack in patches.items():
                for entry in stack:
                    adapters[id(entry[1])] = entry[1], self._adapter(name, entry[1])
        self._adapters = adapters
        foreign = {
            name
            for patches in host_patches.values()
            for name, stack in patches.items()
            if not all(self._understood(model, name, entry) for entry in stack)
        }
        ours = [
            Patch(
                _source(identifier),
                _target(name, offset, function),
                self._adapters[id(value)][1],  # type: ignore[arg-type]
                float(strength),
                float(base_factor),
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

    def _adapter(self, name: str, value: Any) -> Adapter | None:
        if id(value) in self._adapters:
            return self._adapters[id(value)][1]
        try:
            return from_forge_patch(name, value)
        except AdapterError as error:
            logger.warning("a patch of another extension is left to the WebUI: %s", error)
            return None

    def _understood(self, model: nn.Module, name: str, entry: Sequence[Any]) -> bool:
        _, value, _, offset, function = entry
        adapter = self._adapters[id(value)][1]
        if adapter is None:
            return False
        try:
            target = _target(name, offset, function)
            shape = target_shape(model, target)
            adapter.check(shape)
        except (AdapterError, StorageError, AttributeError, AssertionError):
            return False
        if (
            find_site(model, name).kind == "shadow"
            and not find_site(model, name).parameter.is_floating_point()
        ):
            return False
        return target.row_function is None or row_order(target.row_function, shape[0]) is not None


def _target(name: str, offset: Any, function: Any) -> Target:
    return Target.parse(name if offset is None and function is None else (name, offset, function))


def _source(identifier: Any) -> str:
    return str(identifier[0]) if isinstance(identifier, tuple) and identifier else str(identifier)


def _flat(host_patches: HostPatches) -> tuple[object, ...]:
    """Everything that decides the result, comparable: values by identity, numbers by value."""
    return tuple(
        (str(identifier), name, id(value), strength, base_factor, offset, function)
        for identifier, patches in host_patches.items()
        for name, stack in patches.items()
        for strength, value, base_factor, offset, function in stack
    )
