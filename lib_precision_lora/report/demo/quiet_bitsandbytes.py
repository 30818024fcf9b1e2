"""bitsandbytes, imported without what it says on the way.

It logs, warns or prints by version, CPU and card (about a missing kernel package, a build without CUDA). That
is no part of the demo's report, and is kept as debug lines of ours.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

logger = logging.getLogger(__name__)


@contextmanager
def unheard(package: str) -> Iterator[None]:
    """Take what a package prints, warns and logs (by loggers under its name) off both streams.

    Its errors pass.
    """
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    source = logging.getLogger(package)
    propagates = source.propagate
    source.addHandler(handler)
    source.propagate = False
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        source.removeHandler(handler)
        source.propagate = propagates
        for line in said.getvalue().splitlines():
            logger.debug("%s: %s", package, line)


with unheard("bitsandbytes"):
    import bitsandbytes.functional as functional
    from bitsandbytes.nn.modules import Params4bit

__all__ = ["Params4bit", "functional", "unheard"]
