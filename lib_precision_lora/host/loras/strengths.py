"""The strengths of a prompt's LoRAs, as the WebUI reads them, and what is wrong with those that are none."""

from __future__ import annotations

from typing import Any

from lib_precision_lora.adapters.adapter import LARGEST


def unreadable(params: Any) -> str | None:
    """Why the WebUI cannot read one `<lora:…>` of a prompt; None where it can.

    params: its `ExtraNetworkParams`. By itself it would give up all LoRAs of the prompt, without a word.
    """
    positional, named = params.positional, params.named
    if not positional:
        return "it has no name"
    given = [*positional[1:3], *(named[key] for key in ("te", "unet") if key in named)]
    for text in given:
        try:
            float(text)
        except (TypeError, ValueError):
            return f"its strength is {str(text)[:40]!r}, it must be a number"
    for text in [*positional[3:4], *([named["dyn"]] if "dyn" in named else [])]:
        try:
            int(text)
        except (TypeError, ValueError):
            return f"its fourth number is {str(text)[:40]!r}, it must be a whole number"
    return None


def name_in(params: Any) -> str:
    """The name in one `<lora:…>`; empty where there is none."""
    return str(params.positional[0]) if params.positional else ""


def reportable(strength: Any) -> float:
    """A strength for a report; 0 for one that is no number within fp32, which is then that of nothing."""
    return float(strength) if isinstance(strength, int | float) and abs(strength) <= LARGEST else 0.0
