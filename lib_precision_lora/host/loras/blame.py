"""Whose a failure is that does not say so: sources are tried one after the other.

A source is a file of the prompt, or another extension's patches. It goes whole, and the rest goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lib_precision_lora.branch import PatchError
from lib_precision_lora.host.generation.progress import Interrupted

logger = logging.getLogger("lib_precision_lora")

Attempt = Callable[[Sequence[str]], object]
"""Does what has failed, with these sources alone of those that may be to blame; raises where it fails."""


def blamed(error: Exception, sources: Sequence[str], attempt: Attempt) -> PatchError | None:
    """The source to leave out, with the reason: the one that the error names, or the first of these that
    fails after those before it. None where all of them succeed now, which the last attempt has done.

    Lets `Interrupted` pass.
    """
    if isinstance(error, PatchError) and error.source is not None:
        return problem_of(error, error.source)
    unforeseen = None if isinstance(error, PatchError) else error
    logger.warning("%s; LoRAs are tried one after the other", str(error), exc_info=unforeseen)
    for count, source in enumerate(sources, 1):
        try:
            attempt(sources[:count])
        except Interrupted:
            raise
        except Exception as failure:  # noqa: BLE001  whatever it is, it is this source's
            return problem_of(failure, source)
    return None


def problem_of(error: Exception, source: str) -> PatchError:
    """The error as the reason for leaving this source out. A new one: the raised one's traceback would keep
    the model alive."""
    message = str(error)
    if not isinstance(error, PatchError):
        message = (
            f"attaching failed ({type(error).__name__}: {error}); please report it with the console's log"
        )
    return PatchError(message if message.startswith(f"{source}: ") else f"{source}: {message}", source)
