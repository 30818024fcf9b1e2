"""What the WebUI's script callbacks do."""

from __future__ import annotations

from typing import Any

from lib_precision_lora.host import binding


def show_late_notices(p: Any, processed: Any) -> None:
    """Put messages that came up while a model was placed under the finished image."""
    active = binding.active()
    if active is None:
        return
    for message in active.notices.take_late():
        p.comment(message)
        processed.comments += f"{message}\n"
