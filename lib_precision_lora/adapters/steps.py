"""The steps by which adapters change a running weight W, each on a range of its rows.

    Add      W ← W + scale · diag(1 + row_change) · term · N₁ · N₂ · …
    Left     W ← (I + factor · dM) · W
    Right    W ← W + factor · diag(share) · W · dN

The effective weight after any stack of adapters is the base with its Right steps, followed by the Add and
Left steps in order: a Right step moves through those before it into their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lib_precision_lora.adapters.operators import Operator
from lib_precision_lora.adapters.terms import Term

Turn = tuple[Operator, float]
"""An operator with the factor of its deviation."""


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Rows [start, stop) gain `scale · diag(1 + row_change) · term[first : …] · Π (I + f·dN)`.

    row_change: [stop − start] fp32, 0 where None; columns: the turns on the input side, in the order of the
    product.
    """

    start: int
    stop: int
    term: Term
    scale: float
    first: int = 0
    row_change: Tensor | None = None
    columns: tuple[Turn, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Left:
    """Rows [start, stop) are turned by an operator on outputs."""

    start: int
    stop: int
    operator: Operator
    factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Right:
    """Rows [start, stop) see their input turned by an operator on inputs, each by its share of the factor.

    share: [stop − start] fp32, 1 where None.
    """

    start: int
    stop: int
    operator: Operator
    factor: float = 1.0
    share: Tensor | None = None


Step = Add | Left | Right


class Running(Protocol):
    """The running weight that an adapter meets: the rows that it concerns, after all adapters before it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def row_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        """`Σⱼ (W + additions)[i, j]²`: [rows] fp64."""
        ...

    def column_squares(self, additions: Sequence[Add] = ()) -> Tensor:
        """`Σᵢ (W + additions)[i, j]²`: [columns] fp64, columns with the kernel."""
        ...

    def remember(self, adapter: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, kept while the adapter and everything that runs before it stay the same."""
        ...

    def times(self, matrix: Tensor) -> Tensor:
        """`W · matrix`: [rows, n] fp32; matrix: [columns, n]."""
        ...
