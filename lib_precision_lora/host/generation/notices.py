"""What the binding has to tell: to the log at once, to the page and the infotext with the image."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from typing import Any

from lib_precision_lora.host.generation.name_list import joined, separated
from lib_precision_lora.plain_text import plain, sentence

logger = logging.getLogger("lib_precision_lora")

INFOTEXT_SKIPPED = "Precision LoRA skipped"


_ENDING = re.compile(r"\.(safetensors|ckpt|pt|bin)(?= \(\d+\)$|$)")


def tell(p: Any, message: str) -> None:
    """Say something about one generation that is no LoRA's fault: to the log, and below its images.

    p: the host's processing object. It holds comments until the images are there, also those from before
    its model is loaded.
    """
    message = sentence(message)
    if message not in p.comments:
        logger.warning("%s", message)
        p.comment(message)


def name_of(source: str) -> str:
    """A file's name as prompts have it: people share the infotext of images, not where their files are."""
    return _ENDING.sub("", os.path.basename(source)) if os.path.isabs(source) else source


class GenerationStopped(RuntimeError):
    """A LoRA could not be applied, and the user wants no image without it."""


class Notices:
    """Collects what went wrong with the LoRAs that are set now, and shows it with their image.

    generation: returns an object that is another one in every generation; what a former one has left
    behind, however it ended, is none of the next one's.
    """

    def __init__(self, generation: Callable[[], object] = lambda: None) -> None:
        self._generation = generation
        self._present: object = None
        self._problems: dict[str, str] = {}
        self._failures: set[str] = set()
        self._not_waited_for: set[str] = set()
        self._shown: set[str] = set()
        self._former_passes: list[str] = []

    def begin(self) -> None:
        """Forget the previous set's problems, but for those of this generation that nobody has seen."""
        self._former_passes = self.unshown()
        self._not_waited_for |= {
            source for message, source in self._problems.items() if message not in self._failures
        }
        self._problems.clear()
        self._failures.clear()
        self._shown.clear()

    def problem(self, source: str, message: str, failed: bool = True) -> None:
        """A file that was left out. source: its name or path, of which the name is shown; message: a
        sentence with the reason, logged once; failed: False where the user wanted it so."""
        self._forget_former_generations()
        name = name_of(source)
        message, source = sentence(message.replace(source, name)), plain(name)
        if message not in self._problems:
            logger.warning("%s", message)
            self._problems[message] = source
        if failed:
            self._failures.add(message)

    def show(self, comments: Any, parameters: dict[str, Any]) -> None:
        """Add what has come up to a generation's comments and to the parameters of its images.

        comments: takes a sentence (`p.comment`, or a list's `append`). The parameters are those of all images
        of a generation; what was left out of one that the user skipped is in the next one.
        """
        self._forget_former_generations()
        present = separated(str(parameters.pop(INFOTEXT_SKIPPED, "")))
        lasting = [part for part in present if part not in self._not_waited_for]
        skipped = dict.fromkeys([*lasting, *self._problems.values()])
        if skipped:
            parameters[INFOTEXT_SKIPPED] = joined(skipped)
        for message in self._problems:
            comments(message)
        self._shown.update(self._problems)

    def unshown(self) -> list[str]:
        """The messages that have come up since the last `show`, once."""
        self._forget_former_generations()
        unseen = [message for message in self._problems if message not in self._shown]
        messages = list(dict.fromkeys([*self._former_passes, *unseen]))
        self._former_passes = []
        self._shown.update(messages)
        return messages

    def stop_if_any(self) -> None:
        """Raise `GenerationStopped` if something could not be applied. An interrupted generation ends by
        itself, without an error."""
        self._forget_former_generations()
        if self._failures:
            problems = "; ".join(message for message in self._problems if message in self._failures)
            self._problems.clear()
            self._failures.clear()
            raise GenerationStopped(
                f"{problems}. The generation was stopped, as set under Settings > Precision LoRA"
            )

    def _forget_former_generations(self) -> None:
        generation = self._generation()
        if generation is not self._present:
            self._present = generation
            self._problems.clear()
            self._failures.clear()
            self._not_waited_for.clear()
            self._shown.clear()
            self._former_passes = []
