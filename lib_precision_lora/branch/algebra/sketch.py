"""A sketch of an effective weight: the same steps with the same shapes, found without reading the base.

A DoRA's norms and a GLoRA's product cost a pass over the stored weight; a plan of the memory needs to know
only how large they are, and is made before the weight is where it can be read fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch.algebra import base_reading, norms
from lib_precision_lora.branch.algebra.effective import EffectiveWeight, RunningRows
from lib_precision_lora.branch.algebra.norms import Axis
from lib_precision_lora.branch.algebra.number_range import Factors
from lib_precision_lora.branch.algebra.reading import reading_bytes
from lib_precision_lora.memory.chunks import FP32

FP64 = 8


@dataclass(slots=True, eq=False)
class Reads:
    """What making the real weight reads from its base. peak: bytes alive at once meanwhile, at most; kept: of
    what is kept of it in RAM, the bytes of each."""

    peak: int = 0
    kept: dict[Hashable, int] = field(default_factory=dict)


class SketchedRows(RunningRows):
    """A running weight (`steps.Running`) whose every norm is 1, and whose every product is 0."""

    __slots__ = ()

    def _squares(self, axis: Axis, additions: Sequence[Add]) -> Tensor:
        stored, form = self.weight.stored, self._form(axis, additions)
        width = math.prod(stored.shape[1:])
        if form is None:
            self._read(reading_bytes(stored.shape, (*self.weight.steps, *additions), FP64))
        else:
            self._read(base_reading.reading_bytes(form, stored))
            self._reads.kept |= {
                (self.start, self.length, part.key): part.nbytes for part in norms.products(form, axis, width)
            }
        return torch.ones(self.length if axis == "row" else width, dtype=torch.float64)

    def times(self, matrix: Tensor) -> Tensor:
        self._read(reading_bytes(self.weight.stored.shape, self.weight.steps, FP32))
        return torch.zeros(self.length, matrix.shape[1])

    def remember(self, adapter: object, make: Callable[[], Tensor]) -> Tensor:
        return make()

    def _read(self, peak: int) -> None:
        self._reads.peak = max(self._reads.peak, peak)

    @property
    def _reads(self) -> Reads:
        assert isinstance(self.weight, SketchedWeight)
        return self.weight.reads


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
