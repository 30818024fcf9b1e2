"""The change of a vector parameter (a bias, a norm's weight), small enough to be kept as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_precision_lora.branch.algebra.effective import EffectiveWeight


class DeltaVector:
    """`W_eff − W0` of one vector in fp32, with a copy on the device that last asked for it."""

    def __init__(self, effective: EffectiveWeight) -> None:
        self._delta = effective.delta(torch.float32).cpu()
        self.placed: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        if self.placed is None or self.placed.device != device:
            self.placed = self._delta.to(device)
        return self.placed

    def release(self) -> None:
        self.placed = None
