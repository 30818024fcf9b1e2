"""What is added to a weight: low-rank, Kronecker, Hadamard, dense and sparse terms, as plain values.

Each holds tensors of the file as they are (no copies, file precision); strengths stay apart from them.
`rows` materializes a part of a term, for norms, tests and reports, never in a forward.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.strict_product import multiply


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """`up · down`; up: [rows, rank], down: [rank, columns], columns with the kernel.

    sizes: the largest absolute element of each, where that is known.
    """

    up: Tensor
    down: Tensor
    sizes: tuple[float, float] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.up.shape[0], self.down.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down

    def reordered(self, order: Tensor) -> LowRank:
        return LowRank(self.up[order], self.down, self.sizes)

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """These rows, all columns: [rows, columns]."""
        return multiply(self.up[numbers].to(dtype), self.down.to(dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """`left ⊗ right`, never expanded: y[(a p)] = Σ left[a, b] · right[p, q] · x[(b q)].

    left: [a, b]; right: the product of its factors, [p, r] and [r, q, *kernel], or [p, q, *kernel] alone.
    """

    left: Tensor
    right: tuple[Tensor, ...]

    @property
    def height(self) -> int:
        """p, the rows of the right factor."""
        return self.right[0].shape[0]

    @property
    def width(self) -> int:
        """q · kernel, its columns."""
        return math.prod(self.right[-1].shape[1:])

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0] * self.height, self.left.shape[1] * self.width

    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, *self.right

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """These rows, all columns: [rows, b · q · kernel]."""
        left = self.left[numbers // self.height].to(dtype)
        right = self.right[0].flatten(1)[numbers % self.height].to(dtype)
        if len(self.right) == 2:
            right = multiply(right, self.right[1].flatten(1).to(dtype))
        return (left[:, :, None] * right[:, None, :]).flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class Hadamard:
    """`(a1 · b1) ∘ (a2 · b2)`, made in row blocks as it is needed; a: [rows, r], b: [r, columns]."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.a1.shape[0], self.b1.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a1, self.b1, self.a2, self.b2

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """These rows, all columns: [rows, columns]."""
        first = multiply(self.a1[numbers].to(dtype), self.b1.to(dtype))
        return first * multiply(self.a2[numbers].to(dtype), self.b2.to(dtype))

    def reordered(self, order: Tensor) -> Hadamard:
        return Hadamard(self.a1[order], self.b1, self.a2[order], self.b2)

    def cheapest(self) -> LowRank | Hadamard:
        """The Khatri-Rao factors, of rank r₁ · r₂, while they multiply less than a dense matrix would."""
        rows, columns = self.size
        rank = self.b1.shape[0] * self.b2.shape[0]
        if rank * (rows + columns) >= rows * columns:
            return self
        up = (self.a1.float()[:, :, None] * self.a2.float()[:, None, :]).flatten(1).contiguous()
        down = (self.b1.float()[:, None, :] * self.b2.float()[None, :, :]).flatten(0, 1)
        return LowRank(up, down)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A whole tensor, of the weight's shape."""

    value: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.value.shape[0], math.prod(self.value.shape[1:])

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """These rows, all columns: [rows, columns]."""
        rows = self.value[numbers].to(dtype)
        return rows.reshape(rows.shape[0], math.prod(self.value.shape[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """`S[row[k], column[k]] += value[k]`, made dense in row blocks as it is needed.

    row, column: [n] int32; value: [n]; size: rows and columns of S.
    """

    row: Tensor
    column: Tensor
    value: Tensor
    size: tuple[int, int]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.row, self.column, self.value

    def reordered(self, order: Tensor) -> Sparse:
        return dataclasses.replace(self, row=order.argsort().to(self.row)[self.row.long()])

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """These rows, all columns: [rows, columns]. A number may occur twice; values of other rows gather in
        one more row, so that nothing asks the device how many there are."""
        height, columns = numbers.numel(), self.size[1]
        block = torch.full((self.size[0],), height, dtype=torch.int64, device=numbers.device)
        block[numbers] = torch.arange(height, device=numbers.device)
        where = block[self.row.long()].mul_(columns).add_(self.column)
        made = torch.zeros((height + 1) * columns, dtype=dtype, device=numbers.device)
        made.scatter_add_(0, where, self.value.to(dtype))
        return made.view(height + 1, columns)[block[numbers]]


Term = LowRank | Kronecker | Hadamard | Dense | Sparse
