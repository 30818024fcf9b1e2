"""A branch that fails in a forward: who can take its file off is told, and the module's output is made again.

The failure may have left a part of the branch in the output, which is therefore not used. Nothing here runs
in a forward that does not fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from lib_precision_lora.branch.forward.autocast import without_autocast
from lib_precision_lora.branch.forward.branch import Branch

logger = logging.getLogger(__name__)

Trial = Callable[[], object]
"""Does again what has failed, with what is attached by then; raises if it fails again."""

Listener = Callable[[str, Exception, Trial | None], None]
"""Told the layer, the error, and a trial by which to find the file that is to blame; None where trials have
found nobody, and the layer has failed again."""


class Rescue:
    """present: what runs beside the module of this name now, or None; listener: None where errors of a branch
    are to leave its forward."""

    def __init__(self, present: Callable[[str], Branch | None]) -> None:
        self._present = present
        self.listener: Listener | None = None

    def output(
        self, name: str, module: Any, x: Tensor, own: Callable[[], Tensor], error: Exception
    ) -> Tensor:
        """`y + branch(x)` with what the listener has left attached; y alone where that fails, too.

        own: makes y, the module's own output.
        """
        assert self.listener is not None
        trials: tuple[Trial | None, ...] = (partial(self._run, name, module, x, own), None)
        for trial in trials:
            logger.warning("layer %s: its LoRAs failed in a forward", name, exc_info=error)
            with without_autocast(x.device.type):
                self.listener(name, error, trial)
            try:
                return self._run(name, module, x, own)
            except Exception as again:  # noqa: BLE001  a device can fail in any way
                error = again
        return own()

    def _run(self, name: str, module: Any, x: Tensor, own: Callable[[], Tensor]) -> Tensor:
        y, branch = own(), self._present(name)
        return y if branch is None else beside(branch, module, x, y)


def beside(branch: Branch, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`y + branch(x)`, in the precision that the branch chooses."""
    with without_autocast(y.device.type):
        return branch(module, x, y)
