"""What a generation asks for: the accordion's controls, the API's arguments, the axes of a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib_precision_lora.ui.choices import COMPUTE_CHOICES, OURS, PATCHERS

NAMES = ("enabled", "low_bits", "compute", "patcher")
FEWEST = 3
"""The patcher may be left out."""


def problems(arguments: Sequence[Any], low_bits_choices: Sequence[str]) -> list[str]:
    """Why these are no arguments of the script, a sentence each."""
    if not FEWEST <= len(arguments) <= len(NAMES):
        return [
            f"Precision LoRA takes {FEWEST} or {len(NAMES)} arguments ({', '.join(NAMES)}), "
            f"and was given {len(arguments)}"
        ]
    found = []
    if not isinstance(arguments[0], bool):
        found.append(f"Precision LoRA: enabled must be true or false, not {shown(arguments[0])}")
    choices = (low_bits_choices, COMPUTE_CHOICES, PATCHERS)
    for name, value, allowed in zip(NAMES[1:], arguments[1:], choices, strict=False):
        if not isinstance(value, str) or value not in allowed:
            found.append(f"Precision LoRA: {name} must be one of {', '.join(allowed)}; not {shown(value)}")
    return found


def shown(value: Any) -> str:
    """A value in an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def wanted(
    arguments: Sequence[Any], axes: dict[str, str], low_bits_choices: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The override's fields, and what is wrong with the arguments, which then count for nothing.

    axes: those that a plot sets, which go before the accordion's. No arguments at all are no mistake: another
    extension's generation may have none. A choice that is not there (any more: a page may have been open
    since before) is passed on: `override.offered` leaves it out alone, and says so.
    """
    if not arguments or not _well_formed(arguments):
        return dict(axes), problems(arguments, low_bits_choices) if arguments else []
    enabled, *choices = arguments
    fields = dict(zip(NAMES[1:], [*choices, OURS], strict=False)) if enabled else {}
    return {**fields, **axes}, []


def _well_formed(arguments: Sequence[Any]) -> bool:
    """The right number of the right types."""
    return (
        FEWEST <= len(arguments) <= len(NAMES)
        and isinstance(arguments[0], bool)
        and all(isinstance(value, str) for value in arguments[1:])
    )
