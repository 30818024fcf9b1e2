"""(IA)³: `W' = diag(1 + v) · W` on outputs, or `W' = W · diag(1 + v)` on inputs.

Source: arXiv 2205.05638. LyCORIS stores v (`weight`, `on_input`), PEFT stores l = 1 + v (`ia3_l`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import read_number
from lib_precision_lora.adapters.operators import Diagonal
from lib_precision_lora.adapters.steps import Left, Right, Running, Step


@dataclass(frozen=True, slots=True, eq=False)
class IA3:
    """change: v, [out] or [in] fp32; on_input: which of the two. On a bias, outputs alone.

    either: the file does not say (PEFT on a convolution); the layer's sizes decide, for outputs where both
    are equal. The bias beside it then stays as it is where the weight's inputs are scaled.
    _spread: v by column, for each size of kernel, as long as anyone holds it: a change of strength meets
    the same tensor again.
    """

    change: Tensor
    on_input: bool
    either: bool = False
    kind: str = "ia3"
    _spread: WeakValueDictionary[int, Tensor] = field(
        default_factory=WeakValueDictionary, init=False, repr=False
    )

    @property
    def rank(self) -> None:
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.change,)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.either and len(shape) < 2:
            return
        if self.on_input and len(shape) < 2:
            raise AdapterError("a scale of inputs on a vector")
        on_input = self._on_input(shape)
        expected = shape[1] if on_input else shape[0]
        if self.change.numel() != expected:
            raise AdapterError(
                f"the (IA)³ scale has {self.change.numel()} values, the layer has {expected} "
                f"{'inputs' if on_input else 'outputs'}: the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> IA3:
        return (
            self
            if self._on_input(tuple(order.shape))
            else dataclasses.replace(self, change=self.change[order])
        )

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        rows = running.shape[0]
        if self._on_input(running.shape):
            if len(running.shape) < 2:
                return ()
            return (Right(0, rows, self._by_column(math.prod(running.shape[2:])), strength),)
        return (Left(0, rows, Diagonal(self.change), strength),)

    def _on_input(self, shape: tuple[int, ...]) -> bool:
        return self.change.numel() != shape[0] if self.either else self.on_input

    def _by_column(self, kernel: int) -> Diagonal:
        if kernel == 1:
            return Diagonal(self.change)
        by_column = self._spread.get(kernel)
        if by_column is None:
            self._spread[kernel] = by_column = self.change.repeat_interleave(kernel)
        return Diagonal(by_column)


def read_ia3(name: str, tensors: Mapping[str, Tensor]) -> tuple[IA3 | None, IA3 | None]:
    """The (IA)³ of a layer's weight, and of its bias, among its tensors by role.

    PEFT scales the bias with the outputs, LyCORIS leaves it. Raises `AdapterError`: NaN, inf, no vector.
    """
    if "ia3_l" in tensors:
        scale = as_float_factor(name, "ia3_l", tensors["ia3_l"])
        require_finite(name, ia3_l=scale)
        on_input = scale.ndim == 2 and scale.shape[0] == 1 and scale.numel() > 1
        weight = IA3((scale.double() - 1.0).flatten().float(), on_input, either=scale.ndim > 2)
        return weight, None if on_input else weight
    if "on_input" in tensors and "weight" in tensors:
        change = as_float_factor(name, "weight", tensors["weight"])
        require_finite(name, weight=change)
        on_input = bool(read_number(name, "on_input", tensors["on_input"]))
        return IA3(change.flatten().float(), on_input), None
    return None, None
