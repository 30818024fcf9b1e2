"""What the command line and the loading options say while the host runs."""

from __future__ import annotations

from typing import Any

dynamic_args: dict[str, Any] = {}
