"""A sketch of an effective weight: the same steps with the same shapes, found without reading the base.

A DoRA's norms and a GLoRA's product cost a pass over the stored weight; a plan of the memory needs to know
only how large they are, and is made before the weight is where it can be read fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch.effective import EffectiveWeight, RunningRows
from lib_precision_lora.branch.number_range import Factors


@dataclass(slots=True, eq=False)
class Reads:
    """element_bytes: of the arithmetic in which the real weight's base is read; 0 where it is not."""

    element_bytes: int = 0


class SketchedRows(RunningRows):
    """A running weight (`steps.Running`) whose every norm is 1, and whose every product is 0."""

    __slots__ = ()

    def row_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        self._read(torch.float64)
        return torch.ones(self.length, dtype=torch.float64)

    def column_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        self._read(torch.float64)
        return torch.ones(self.shape[1:], dtype=torch.float64).flatten()

    def times(self, matrix: Tensor) -> Tensor:
        self._read(torch.float32)
        return torch.zeros(self.length, matrix.shape[1])

    def remember(self, adapter: object, make: Callable[[], Tensor]) -> Tensor:
        return make()

    def _read(self, dtype: torch.dtype) -> None:
        assert isinstance(self.weight, SketchedWeight)
        reads = self.weight.reads
        reads.element_bytes = max(reads.element_bytes, dtype.itemsize)


@dataclass(frozen=True, slots=True, eq=False)
class SketchedWeight(EffectiveWeight):
    """An effective weight with the shapes of the real one, and other numbers.

    reads: what making the real one reads, in this weight and in all that it came from.
    """

    reads: Reads = field(default_factory=Reads)

    def running(self, start: int, length: int) -> RunningRows:
        return SketchedRows(self, start, length)

    def largest(self, factors: Factors) -> float:
        """No tensor is looked at."""
        return 1.0
