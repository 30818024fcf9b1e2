"""A sketch of an effective weight: the same steps with the same shapes, found without reading the base.

A DoRA's norms and a GLoRA's product cost a pass over the stored weight; a plan of the memory needs to know
only how large they are, and is made before the weight is where it can be read fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch.effective import EffectiveWeight, RunningRows


class SketchedRows(RunningRows):
    """A running weight (`steps.Running`) whose every norm is 1, and whose every product is 0."""

    __slots__ = ()

    def row_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        return torch.ones(self.length, dtype=torch.float64)

    def column_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        return torch.ones(self.shape[1:], dtype=torch.float64).flatten()

    def times(self, matrix: Tensor) -> Tensor:
        return torch.zeros(self.length, matrix.shape[1])

    def remember(self, adapter: object, make: Callable[[], Tensor]) -> Tensor:
        return make()


class SketchedWeight(EffectiveWeight):
    """An effective weight with the shapes of the real one, and other numbers."""

    __slots__ = ()

    def running(self, start: int, length: int) -> RunningRows:
        return SketchedRows(self, start, length)
