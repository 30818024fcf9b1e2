"""What the binding has to tell: to the log at once, to the page and the infotext with the image."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger("lib_precision_lora")

INFOTEXT_SKIPPED = "Precision LoRA skipped"


class GenerationStopped(RuntimeError):
    """A LoRA could not be applied, and the user wants no image without it."""


class Notices:
    """Collects what went wrong with this generation's LoRAs."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._late: list[str] = []

    def begin(self) -> None:
        """Forget the previous set's problems."""
        self._problems.clear()

    def problem(self, engine: Any, source: str, message: str) -> None:
        """A file that was left out: log it, and have the WebUI show and record it with the image.

        source: the file's name for the infotext; message: the sentence that names it and the reason.
        """
        logger.warning("%s", message)
        self._problems.append(message)
        comments: list[str] | None = getattr(engine, "comments", None)
        if comments is None:
            self._late.append(message)
        elif message not in comments:
            comments.append(message)
        parameters: dict[str, Any] | None = getattr(engine, "extra_generation_params", None)
        if parameters is not None:
            present = [part for part in parameters.get(INFOTEXT_SKIPPED, "").split(", ") if part]
            parameters[INFOTEXT_SKIPPED] = ", ".join(dict.fromkeys([*present, source]))

    def late_problem(self, message: str) -> None:
        """A problem that shows while the model is placed, when the WebUI has collected its comments."""
        logger.warning("%s", message)
        self._problems.append(message)
        self._late.append(message)

    def take_late(self) -> Iterable[str]:
        """The messages that the WebUI has not shown yet, once."""
        late, self._late = self._late, []
        return late

    def stop_if_any(self) -> None:
        """Raise `GenerationStopped` if something was left out."""
        if self._problems:
            problems = "; ".join(self._problems)
            self._problems.clear()
            raise GenerationStopped(
                f"{problems}. The generation was stopped, as set under Settings > Precision LoRA"
            )
