"""What a session is asked to apply, and what it says it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lib_precision_lora.adapters import Adapter, AdapterError, Target
from lib_precision_lora.branch.session.sites import find_parameter

PatchItem = tuple[str, Mapping[str | Target, Adapter], float]
"""A file's name, its adapters, its strength."""


class PatchError(AdapterError):
    """A patch set that was not applied; the model is as it was before the call.

    source: the file to blame, where it is one file; parameter: where it came up, otherwise.
    """

    def __init__(self, message: str, source: str | None = None, parameter: str | None = None) -> None:
        super().__init__(message)
        self.source = source
        self.parameter = parameter


class PatchMemoryError(PatchError):
    """A patch set for which there was no memory: layer and bytes are in the message."""


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """One adapter on one parameter, as part of a stack.

    source: the file's name, for messages; target.parameter: as in the model's `named_parameters`;
    base_factor: what the running weight's rows are multiplied with first (a host's `strength_model`).
    widens: the parameter is that of an input layer, and the adapter may have another number of input
    channels than it; those that only one of the two has count as zeros in the other.
    """

    source: str
    target: Target
    adapter: Adapter
    strength: float
    base_factor: float = 1.0
    widens: bool = False

    @property
    def changes_nothing(self) -> bool:
        """At strength 0 a widened layer still takes the wider input."""
        without_effect = self.base_factor == 1.0 and self.strength == 0.0 and self.adapter.kind != "set"
        return without_effect and not self.widens


@dataclass(frozen=True, slots=True)
class Applied:
    """What a session runs now: for each source the parameters it concerns, and the names not found."""

    parameters: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, tuple[str, ...]]


def resolve(model: nn.Module, items: Sequence[PatchItem]) -> tuple[list[Patch], Applied]:
    """Patches for the names that the model has, in order.

    Raises `PatchError` for a file none of whose names it has.
    """
    patches: list[Patch] = []
    found: dict[str, list[str]] = {}
    missing: dict[str, list[str]] = {}
    for source, adapters, strength in items:
        present = 0
        for name, adapter in adapters.items():
            target = Target.parse(name)
            parameter = find_parameter(model, target.parameter)
            if parameter is None:
                missing.setdefault(source, []).append(target.parameter)
                continue
            present += 1
            found.setdefault(source, []).append(parameter)
            patches.append(
                Patch(source, Target(parameter, target.rows, target.row_function), adapter, strength)
            )
        if not present:
            raise PatchError(f"{source}: none of its {len(adapters)} layers is in this model", source)
    return patches, Applied(
        {source: tuple(names) for source, names in found.items()},
        {source: tuple(names) for source, names in missing.items()},
    )
