"""Rows of a weight that is stored as a row-major stream of fixed-size blocks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import prod

from torch import Tensor

from .weight import StoredWeight


@dataclass(frozen=True, slots=True, eq=False)
class BlockedWeight(StoredWeight):
    """Values are numbered row by row; block k holds values k·B to (k + 1)·B, B = block_size.

    Rows may begin and end inside a block (a width that is no multiple of B), and the last block may be
    partly unused.
    """

    block_size: int

    @abstractmethod
    def decode_blocks(self, first: int, last: int) -> Tensor:
        """Blocks first to last, the latter excluded: fp32 [last - first, block_size], memory of its own."""

    @abstractmethod
    def undecoded(self, first: int, last: int) -> Tensor:
        """The numbers that these blocks are stored as: codes and scales."""

    def sample(self, row: int) -> Tensor:
        """The block in which the row begins and those behind it, up to a row's length."""
        row_size = prod(self.shape[1:])
        count, blocks = block_count(row_size, self.block_size), block_count(prod(self.shape), self.block_size)
        first = min(row * row_size // self.block_size, blocks - count)
        return self.undecoded(first, first + count)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop through blocks ⌊start·n / B⌋ to ⌈stop·n / B⌉, where n = prod(shape[1:])."""
        row_size = prod(self.shape[1:])
        begin, end = start * row_size, stop * row_size
        first, last = begin // self.block_size, block_count(end, self.block_size)
        skipped = first * self.block_size
        values = self.decode_blocks(first, last).view(-1)
        return values.narrow(0, begin - skipped, end - begin).view(stop - start, *self.shape[1:])


def block_count(values: int, block_size: int) -> int:
    """⌈values / block_size⌉."""
    return -(-values // block_size)
