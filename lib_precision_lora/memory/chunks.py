"""What a branch's forward takes per token, and so how many tokens it treats at a time: pure arithmetic.

Counted in fp32 numbers per token that live at once: i inputs (with the kernel), o outputs, r stacked rank.

    hidden state   i · copies + r                    the input in the product's own type
    additions      o · copies, 2 · (i + o) more where a term is not of low rank
    turned         o for the output in fp32, next to the additions or what an operator takes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

WORKSPACE_BYTES = 32 * 2**20
"""What the fp32 copies of one block of an activation may take together."""

DENSE_BLOCK_BYTES = 8 * 2**20
"""Largest block of a dense remainder that is brought to fp32 at a time."""

FP32 = 4
HALF_COPIES, SINGLE_COPIES, SPLIT_COPIES = 1.5, 1.0, 3.0
"""fp32 copies of an operand in fp16 products, in fp32 products, and in those that TF32 must not round."""

NORM_BYTES = 16
"""For each number of a norm's input: four fp32 copies."""

SCALE_COPIES, BLOCK_COPIES, ORDERED_BLOCK_COPIES = 1.0, 2.0, 4.0
"""Copies of its vectors that an operator makes: a scale, a block rotation, one between permutations."""


def chain_copies(parts: Iterable[float]) -> float:
    """Copies of an operator made of others, one after the other."""
    return 2.0 + max(parts)


@dataclass(frozen=True, slots=True)
class Load:
    """What stands beside one weight of [outputs, inputs · kernel].

    rank: of the stack; copies: fp32 copies of an operand; whole: whether a term is not of low rank; left,
    turn: copies that the costliest operator makes on outputs, and on the base's inputs; None without one.
    """

    outputs: int
    inputs: int
    rank: int
    copies: float
    whole: bool = False
    left: float | None = None
    turn: float | None = None

    def token_bytes(self) -> int:
        """Bytes that one token takes in the forward of a linear branch."""
        i, o = self.inputs, self.outputs
        hidden = i * self.copies + self.rank
        additions = o * self.copies + (2 * (i + o) if self.whole else 0)
        numbers = max(hidden, additions)
        if self.left is not None or self.turn is not None:
            numbers = o + max(numbers, (self.left or 0.0) * o)
        if self.turn is not None:
            shift = i * (3 + self.turn)
            numbers = max(numbers, o + shift, 2.5 * o + 0.5 * i)
        return int(FP32 * (numbers + 2 * self.rank))

    def position_bytes(self, channels: int) -> int:
        """Bytes that a convolution's forward makes for all positions of a sample at once, for each."""
        numbers = self.rank * self.copies
        if self.turn is not None:
            numbers += 4.0 * channels + self.outputs
        if self.whole:
            numbers += 2 * self.outputs + channels
            numbers += self.outputs if self.left is not None or self.turn is not None else 0
        return int(FP32 * numbers)


def token_count(size: int) -> int:
    """How many tokens of this many bytes each are treated at a time."""
    return max(1, WORKSPACE_BYTES // max(1, size))


def block_bytes(tokens: int, token_size: int) -> int:
    """Bytes of the largest block, of so many bytes for each token."""
    return min(WORKSPACE_BYTES, tokens * token_size)


def dense_block_bytes(elements: int) -> int:
    """The fp32 block of a dense or Hadamard term that is at hand, its source, and its product."""
    return 3 * min(DENSE_BLOCK_BYTES, FP32 * elements)
