"""The input of a layer whose base is turned for all rows by one R: x is turned before the module, once.

    y = module(R x) + branch(x)        instead of        y = module(x) + W0 (R − I) x + branch(x)

For fp32 inputs alone. R x is rounded to the type of x; in half precision that loses a change that is smaller
than the step between two numbers, in the same direction wherever inputs are alike, and rows that sum to
little then give tens of roundings of their output. A second pass, of (R − I) x, keeps law 2 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Turn
from lib_precision_lora.branch.algebra.effective import Piece
from lib_precision_lora.branch.arithmetic.chunks import turning_copies
from lib_precision_lora.branch.arithmetic.product_cost import ProductCost
from lib_precision_lora.branch.arithmetic.token_chunks import token_chunks
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES

Ready = TypeVar("Ready")

CACHED_BYTES = 2 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class InputTurns:
    """What turns the module's input, on its device. tokens: so many at a time."""

    turns: tuple[Turn, ...]
    tokens: int

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """`R x`, fp32 as x is; axis: that of the channels."""
        made = torch.empty_like(x)
        seen, given = made.movedim(axis, -1), x.movedim(axis, -1)
        for x_chunk, chunk in token_chunks(given, seen, self.tokens):
            _turn_into(chunk, x_chunk, self.turns)
        return made


@dataclass(frozen=True, eq=False)
class TurnedInput(Generic[Ready]):
    """A forward that is under way. given: the module's input, not turned; operands: those of the branch."""

    given: Tensor
    operands: Ready


def turns_of_all_rows(pieces: Sequence[Piece]) -> tuple[Turn, ...]:
    """The turns of the only piece of a weight; empty where rows differ."""
    if len(pieces) != 1 or pieces[0].share is not None:
        return ()
    return pieces[0].turns


def turned_before(pieces: Sequence[Piece], dtype: torch.dtype) -> bool:
    """Whether the module is given its input turned; dtype: of the activations."""
    return dtype == torch.float32 and bool(turns_of_all_rows(pieces))


def input_turns(turns: Sequence[Turn], columns: int, cost: ProductCost, device: torch.device) -> InputTurns:
    """columns: of the weight, or the channels of a convolution."""
    tokens = block_bytes(device) // int(FP32 * columns * turning_copies(turns, cost))
    return InputTurns(tuple(turns), max(1, tokens))


def block_bytes(device: torch.device) -> int:
    """What turning a block of tokens takes, at most; on a CPU so little that its caches hold it."""
    return CACHED_BYTES if device.type == "cpu" else WORKSPACE_BYTES


def _turn_into(out: Tensor, x: Tensor, turns: Sequence[Turn]) -> None:
    """`out = N₁ N₂ … x`, the last turn acting first; x, out: [tokens, columns]."""
    out.copy_(x)
    for operator, factor in reversed(turns):
        out.add_(operator.deviation(out), alpha=factor)
