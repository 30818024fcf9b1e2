"""What the WebUI's script callbacks do."""

from __future__ import annotations

from typing import Any

from lib_precision_lora.host import binding


def show_notices(p: Any) -> None:
    """Bring messages about this pass's LoRAs to the page and into the infotext, before it is sampled, and
    again after: some come up when the model is placed.

    The WebUI itself collects an engine's comments once, before the first pass.
    """
    active = binding.active()
    if active is not None:
        active.notices.show(p.comment, p.extra_generation_params)


def show_late_notices(p: Any, processed: Any) -> None:
    """Put messages that came up since then under the finished image."""
    active = binding.active()
    if active is None:
        return
    for message in active.notices.unshown():
        p.comment(message)
        processed.comments += f"{message}\n"
