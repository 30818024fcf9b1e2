"""Axes of the X/Y/Z plot: mode, and "Diffusion in Low Bits"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.infotext import MODES
from lib_precision_lora.plain_text import plain
from lib_precision_lora.ui.choices import COMPUTE_MODES, OURS

MODE_AXIS, LOW_BITS_AXIS = "[Precision LoRA] mode", "[Precision LoRA] low bits"
AXES = "precision_lora_axes"
"""Where a plot's values stand in a generation."""

RELOADS, ATTACHES = 0.95, 0.3
"""Costs, by which the host chooses the outer axis: only another checkpoint (1.0) is above a reload."""


def add_axes() -> None:
    """Put our axes into the plot's list, once; none in a WebUI that the binding does not know."""
    if installation.active() is None:
        return
    from modules import scripts

    from lib_precision_lora.host.generation import override

    for script in scripts.scripts_data:
        module = script.module
        if not hasattr(module, "AxisOption") or not hasattr(module, "axis_options"):
            continue
        present = {option.label for option in module.axis_options}
        for label, field, choices, cost in (
            (MODE_AXIS, "mode", lambda: list(MODES), ATTACHES),
            (LOW_BITS_AXIS, "low_bits", override.low_bits_choices, RELOADS),
        ):
            if label not in present:
                module.axis_options.append(
                    module.AxisOption(
                        label, str, choose(field), confirm=confirm(label, choices), cost=cost, choices=choices
                    )
                )


def choose(field: str) -> Callable[[Any, str, Sequence[str]], None]:
    """Sets one cell's value, in a dictionary of its own: the host copies generations with all they hold."""

    def apply(p: Any, value: str, values: Sequence[str]) -> None:
        chosen = mode_fields(value) if field == "mode" else {field: value}
        setattr(p, AXES, {**getattr(p, AXES, {}), **chosen})

    return apply


def mode_fields(mode: str) -> dict[str, str]:
    """A mode as fields of an override: a compute mode is one of our patcher."""
    if mode in COMPUTE_MODES:
        return {"compute": mode, "patcher": OURS}
    return {"patcher": mode}


def confirm(label: str, choices: Callable[[], Sequence[str]]) -> Callable[[Any, Sequence[str]], None]:
    """Refuses a plot with an unknown value before its first image."""

    def check(p: Any, values: Sequence[str]) -> None:
        allowed = choices()
        for value in values:
            if value not in allowed:
                raise RuntimeError(f"{label}: {plain(value)} is none of {', '.join(allowed)}")

    return check
