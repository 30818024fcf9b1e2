"""What the binding has to tell: to the log at once, to the page and the infotext with the image."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("lib_precision_lora")

INFOTEXT_SKIPPED = "Precision LoRA skipped"


class GenerationStopped(RuntimeError):
    """A LoRA could not be applied, and the user wants no image without it."""


class Notices:
    """Collects what went wrong with the LoRAs that are set now, and shows it with their image."""

    def __init__(self) -> None:
        self._problems: dict[str, str] = {}
        self._shown: set[str] = set()

    def begin(self) -> None:
        """Forget the previous set's problems."""
        self._problems.clear()
        self._shown.clear()

    def problem(self, source: str, message: str) -> None:
        """A file that was left out. source: its name; message: a sentence with the reason."""
        logger.warning("%s", message)
        self._problems[message] = source

    def show(self, comments: Any, parameters: dict[str, Any]) -> None:
        """Add what has come up to a generation's comments and to the parameters of its images.

        comments: takes a sentence (`p.comment`, or a list's `append`).
        """
        if not self._problems:
            return
        present = [part for part in str(parameters.get(INFOTEXT_SKIPPED, "")).split(", ") if part]
        parameters[INFOTEXT_SKIPPED] = ", ".join(dict.fromkeys([*present, *self._problems.values()]))
        for message in self._problems:
            comments(message)
        self._shown.update(self._problems)

    def unshown(self) -> list[str]:
        """The messages that have come up since the last `show`, once."""
        messages = [message for message in self._problems if message not in self._shown]
        self._shown.update(messages)
        return messages

    def stop_if_any(self) -> None:
        """Raise `GenerationStopped` if something was left out."""
        if self._problems:
            problems = "; ".join(self._problems)
            self._problems.clear()
            raise GenerationStopped(
                f"{problems}. The generation was stopped, as set under Settings > Precision LoRA"
            )
