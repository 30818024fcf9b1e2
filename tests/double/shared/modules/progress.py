"""Which task of the page is being done."""

from __future__ import annotations

current_task: str | None = None
