"""What a piece of code allocates: the largest tensor that one operation makes, and the peak of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.memory.meter import ByteMeter


class Meter(ByteMeter):
    """largest: elements of the largest tensor with memory of its own; operations: how many ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.operations = 0

    def __torch_dispatch__(self, *arguments: Any, **named: Any) -> Any:
        self.operations += 1
        return super().__torch_dispatch__(*arguments, **named)

    def _know(self, tensor: Tensor, counted: bool) -> None:
        before = self.live
        super()._know(tensor, counted)
        self.largest = max(self.largest, (self.live - before) // tensor.element_size())


def metered(run: Callable[[], object]) -> Meter:
    """The meter of one run, whose result it keeps alive to the end."""
    with torch.no_grad(), Meter() as meter:
        result = run()
    del result
    return meter
