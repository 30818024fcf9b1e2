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
    extension's generation may have none.
    """
    fields: dict[str, str] = {}
    wrong = problems(arguments, low_bits_choices) if arguments else []
    if arguments and not wrong and arguments[0]:
        patcher = arguments[3] if len(arguments) > FEWEST else OURS
        fields = {"low_bits": arguments[1], "compute": arguments[2], "patcher": patcher}
    return {**fields, **axes}, wrong
