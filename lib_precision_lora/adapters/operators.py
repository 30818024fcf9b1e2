"""Linear operators `M = I + dM` on the rows or the columns of a weight; only the deviation dM is stored.

A scale of 1.01 kept in half precision would lose the adapter again, dM = 0.01 does not. Each operator acts
on vectors that lie along the last axis:

    deviation(z) = z · dMᵀ            transposed(z) = z · dM
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lib_precision_lora.strict_product import strict


class Operator(Protocol):
    """mixes: whether an output element depends on other input elements (a rotation does, a scale not)."""

    @property
    def mixes(self) -> bool: ...

    def deviation(self, z: Tensor) -> Tensor: ...

    def transposed(self, z: Tensor) -> Tensor: ...

    def part(self, start: int, stop: int) -> Operator:
        """The operator on elements [start, stop) alone; only of one that does not mix."""
        ...

    def to(self, device: torch.device) -> Operator: ...

    def tensors(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Uniform:
    """`dM = value · I`."""

    value: float
    mixes: bool = False

    def deviation(self, z: Tensor) -> Tensor:
        return self.value * z

    def transposed(self, z: Tensor) -> Tensor:
        return self.value * z

    def part(self, start: int, stop: int) -> Uniform:
        return self

    def to(self, device: torch.device) -> Uniform:
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        return ()


@dataclass(frozen=True, slots=True, eq=False)
class Diagonal:
    """`dM = diag(values)`; values: [n] fp32."""

    values: Tensor
    mixes: bool = False

    def deviation(self, z: Tensor) -> Tensor:
        return self.values.to(z) * z

    def transposed(self, z: Tensor) -> Tensor:
        return self.values.to(z) * z

    def part(self, start: int, stop: int) -> Diagonal:
        return Diagonal(self.values[start:stop])

    def to(self, device: torch.device) -> Diagonal:
        return Diagonal(self.values.to(device))

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """`dM = P · blockdiag(blocks) · Pᵀ`; blocks: [count, size, size] fp32, of count 1 where all are the same.

    order: the permutation P as element numbers, [count · size]: element i of the block view is element
    order[i] of z. None where the blocks lie as they are. inverse: its inverse.
    """

    blocks: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    mixes: bool = True

    def deviation(self, z: Tensor) -> Tensor:
        return self._turn(z, "bij,...bj->...bi")

    def transposed(self, z: Tensor) -> Tensor:
        return self._turn(z, "bji,...bj->...bi")

    def _turn(self, z: Tensor, equation: str) -> Tensor:
        ordered = z if self.order is None else z[..., self.order]
        blocked = ordered.reshape(*z.shape[:-1], -1, self.blocks.shape[-1])
        turned = strict(partial(torch.einsum, equation), self.blocks.to(z), blocked)
        flat = turned.flatten(-2)
        return flat if self.inverse is None else flat[..., self.inverse]

    def part(self, start: int, stop: int) -> Operator:
        raise ValueError("a rotation cannot be cut")

    def to(self, device: torch.device) -> Blocks:
        return Blocks(
            self.blocks.to(device),
            None if self.order is None else self.order.to(device),
            None if self.inverse is None else self.inverse.to(device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.blocks,)


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """`I + dM = Mₖ · … · M₂ · M₁`, the first of `parts` acting first."""

    parts: tuple[Operator, ...]

    @property
    def mixes(self) -> bool:
        return any(part.mixes for part in self.parts)

    def deviation(self, z: Tensor) -> Tensor:
        total = torch.zeros_like(z)
        for part in self.parts:
            total += part.deviation(z + total)
        return total

    def transposed(self, z: Tensor) -> Tensor:
        total = torch.zeros_like(z)
        for part in reversed(self.parts):
            total += part.transposed(z + total)
        return total

    def part(self, start: int, stop: int) -> Operator:
        return Chain(tuple(part.part(start, stop) for part in self.parts))

    def to(self, device: torch.device) -> Chain:
        return Chain(tuple(part.to(device) for part in self.parts))

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())
