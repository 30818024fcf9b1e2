"""The statistics that torch keeps of a card's memory, without a card."""

from __future__ import annotations

import pytest
import torch


class CardStatistics:
    """in_use and peak: bytes; resets: how often the peak was reset."""

    def __init__(self, patch: pytest.MonkeyPatch, in_use: int, peak: int) -> None:
        self.in_use, self.peak, self.resets = in_use, peak, 0
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: self.reset())

    def use(self, in_use: int) -> None:
        """So many bytes are in use from now on."""
        self.in_use = in_use
        self.peak = max(self.peak, in_use)

    def reset(self) -> None:
        self.peak = self.in_use
        self.resets += 1
