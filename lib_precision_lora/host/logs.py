"""Where our log goes: the WebUI's console, in its own style."""

from __future__ import annotations

import logging
import sys

from lib_precision_lora.plain_text import PlainLog


def set_up_logging() -> None:
    """Give our logger a console of its own unless the WebUI has set one up at this level.

    The WebUI leaves the root logger at WARNING, so what was applied would not be seen. Every
    record is made plain, also for a console of the WebUI's.
    """
    logger = logging.getLogger("lib_precision_lora")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[Precision LoRA] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    for place in (logger, *logger.handlers):  # a logger's filters do not see what comes from those below it
        if not any(isinstance(each, PlainLog) for each in place.filters):
            place.addFilter(PlainLog())
