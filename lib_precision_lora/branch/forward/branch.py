"""What every branch offers, whatever it runs beside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from lib_precision_lora.branch.forward.wide_input import WideInput


class Branch(Protocol):
    """What runs after a module's forward: `y + branch(x)`, in y's memory where that allows.

    wide_input: what stands before the module's forward where its input is widened. turns_inputs: whether
    `turned` may be asked for the module's input.
    """

    wide_input: WideInput | None

    @property
    def turns_inputs(self) -> bool: ...

    @property
    def given(self) -> Tensor | None:
        """What stood in the place of the module's input that was turned, if it was."""
        ...

    def turned(self, x: Tensor) -> Tensor | None:
        """What the module is to be given instead of x; None where that is x."""
        ...

    def __call__(self, module: Any, x: Tensor, y: Tensor) -> Tensor: ...

    def structure(self) -> tuple[object, ...]:
        """Equal for two branches that differ in strengths only."""
        ...

    def restrength(self, other: Any) -> None:
        """Take the strengths of a branch of equal structure."""
        ...

    def release(self) -> None:
        """Let go of what was made for a device."""
        ...

    def placed(self) -> Iterator[Tensor]:
        """Every tensor that was made for a device."""
        ...
