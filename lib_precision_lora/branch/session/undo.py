"""Running all of several steps, whichever of them fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)

Undo = list[Callable[[], None]]
"""How to take back what was done, in the order in which it was done."""


def run_all(steps: Iterable[Callable[[], None]]) -> None:
    """Run each; the first failure is raised when all have been tried."""
    failure: Exception | None = None
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001  raised below
            failure = failure or error
    if failure is not None:
        raise failure


def run_back(undo: Undo) -> None:
    """The steps, last first, while another exception is on its way: a failure here is logged."""
    try:
        run_all(reversed(undo))
    except Exception:
        logger.exception(
            "taking a LoRA back failed at a layer, which stays without; the others are as before"
        )
