"""Patches at the strength at which their memory is planned: that of additions does not depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib_precision_lora.adapters import ForgePatch
from lib_precision_lora.branch.session.strengths import ADDITIVE
from lib_precision_lora.host.loras.division import HostPatches, source_of

PLANNED_STRENGTH = 16.0
"""Above what people ask for. Where it is not refused, no smaller one is."""


def at_planned_strength(host_patches: HostPatches) -> dict[Any, Mapping[str, Sequence[Sequence[Any]]]]:
    """The same patches, those of layers to which every file only adds at PLANNED_STRENGTH.

    Strengths of 0, of which nothing is made, and larger ones stay. The identifiers, in which the host has the
    strengths too, are those of the sources, in order.
    """
    others = {
        name
        for patches in host_patches.values()
        for name, stack in patches.items()
        if not all(_adds(entry[1]) for entry in stack)
    }
    return {
        (source_of(identifier), number): {
            name: stack if name in others else [_planned(entry) for entry in stack]
            for name, stack in patches.items()
        }
        for number, (identifier, patches) in enumerate(host_patches.items())
    }


def _adds(value: Any) -> bool:
    return isinstance(value, ForgePatch) and isinstance(value.adapter, ADDITIVE) and not value.widens


def _planned(entry: Sequence[Any]) -> Sequence[Any]:
    strength, *rest = entry
    return (PLANNED_STRENGTH, *rest) if 0.0 < abs(strength) < PLANNED_STRENGTH else entry
