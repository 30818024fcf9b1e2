"""Where an adapter of a file belongs in a model: a parameter, or some rows of a fused one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError


@dataclass(frozen=True, slots=True)
class Target:
    """`rows[0] : rows[0] + rows[1]` of a parameter (all of it where rows is None).

    row_function: a reordering of rows between the file's layout and the model's (a host's
    `swap_scale_shift`), applied to the output side of the adapter.
    """

    parameter: str
    rows: tuple[int, int] | None = None
    row_function: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def parse(cls, value: Any) -> Target:
        """From a host's key map: `name`, `(name, (0, start, length))` or `(name, offset, function)`.

        Raises `AdapterError` where the offset is not one of rows.
        """
        if isinstance(value, Target):
            return value
        if isinstance(value, str):
            return cls(value)
        name, offset, *rest = value
        rows = None
        if offset is not None:
            axis, start, length = offset
            if axis != 0:
                raise AdapterError(f"{name}: an offset on axis {axis} of a fused weight is not supported")
            rows = (int(start), int(length))
        return cls(name, rows, rest[0] if rest else None)

    @property
    def name(self) -> str | Target:
        """The plain parameter name where that says all."""
        return self.parameter if self.rows is None and self.row_function is None else self

    def bias(self) -> Target:
        """The same rows of the bias beside this weight."""
        return replace(self, parameter=self.parameter.removesuffix(".weight") + ".bias")


def row_order(function: Callable[[Tensor], Tensor], rows: int) -> Tensor | None:
    """The permutation `p` with `function(X) = X[p]`, or None if the function is not one.

    Found by passing row numbers through it; a second pass with scaled numbers tells a permutation from
    arithmetic.
    """
    numbers = torch.arange(rows, dtype=torch.float64)[:, None]
    try:
        moved, tripled = function(numbers), function(3 * numbers + 1)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    if moved.shape != numbers.shape or not torch.equal(3 * moved + 1, tripled):
        return None
    order = moved.flatten().long()
    return order if torch.equal(order.sort().values, torch.arange(rows)) else None
