"""The input of a layer whose base is turned for all rows by one R: x is turned before the module, once.

    y = module(R x) + branch(x)        instead of        y = module(x) + W0 (R − I) x + branch(x)

R x is rounded to the type of x, which costs the output about one rounding. Together with the module's own
that keeps law 2, as long as nothing is added that rounds half-precision outputs once more. In fp16 an input
so large that R x might overflow is reduced by a power of two; a bias then costs one more rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from lib_precision_lora.adapters.operators import Blocks, Chain, Diagonal, Operator, Uniform
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.branch.chunks import turning_copies
from lib_precision_lora.branch.effective import Piece
from lib_precision_lora.branch.product_cost import ProductCost
from lib_precision_lora.branch.token_chunks import token_chunks
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES

Ready = TypeVar("Ready")

Turning = Literal["whole", "reduced"]
"""How a module is given R x: as it is, or times a power of two, where its type might not hold it (fp16)."""

HALVES = (torch.float16, torch.bfloat16)

CACHED_BYTES = 2 * 2**20

LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, eq=False)
class InputTurns:
    """What turns the module's input, on its device. tokens: so many at a time.

    growth: a bound of `|R x| / |x|` by largest elements, of an input that is reduced; else None.
    """

    turns: tuple[Turn, ...]
    tokens: int
    growth: float | None

    def apply(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """`size · R x` in the type of x, and the size, a power of two at most 1: fp32, None for 1.

        axis: that of the channels.
        """
        size = None if self.growth is None else reduction(x, self.growth)
        made = torch.empty_like(x)
        seen, given = made.movedim(axis, -1), x.movedim(axis, -1)
        for x_chunk, chunk in token_chunks(given, seen, self.tokens):
            _turn_into(chunk, x_chunk, self.turns, size)
        return made, size


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


def turning_for(
    pieces: Sequence[Piece], steps: Sequence[Add | Left], bias: bool, dtype: torch.dtype
) -> Turning | None:
    """How the module is given its input, None where it is as it comes, and a second pass turns it.

    bias: whether the module's bias is changed; dtype: of the activations. Half-precision outputs to which
    something is added would be rounded three times: by the input, by the module, and by the sum.
    """
    if not turns_of_all_rows(pieces):
        return None
    if dtype == torch.float32:
        return "whole"
    if dtype not in HALVES or steps or bias:
        return None
    return "reduced" if dtype == torch.float16 else "whole"


def block_bytes(device: torch.device) -> int:
    """What turning a block of tokens takes, at most; on a CPU so little that its caches hold it."""
    return CACHED_BYTES if device.type == "cpu" else WORKSPACE_BYTES


def input_turns(
    turns: Sequence[Turn], columns: int, turning: Turning, cost: ProductCost, device: torch.device
) -> InputTurns:
    """columns: of the weight, or the channels of a convolution."""
    tokens = max(1, block_bytes(device) // int(FP32 * columns * turning_copies(turns, cost)))
    growth = math.prod(1.0 + abs(factor) * row_sum(operator) for operator, factor in turns)
    return InputTurns(tuple(turns), tokens, growth if turning == "reduced" else None)


def reduction(x: Tensor, growth: float) -> Tensor:
    """The largest power of two s ≤ 1 for which `s · growth · max |x|` is in the range of fp16.

    At least 1 / (2 · growth), which is enough for every x that is finite in fp16.
    """
    least = 2.0 ** -math.ceil(math.log2(growth))
    if not x.numel():
        return x.new_ones((), dtype=torch.float32)
    low, high = x.aminmax()
    largest = torch.maximum(high.float(), -low.float())
    room = (LARGEST_HALF / growth / largest).nan_to_num(nan=1.0)
    return torch.exp2(torch.floor(torch.log2(room.clamp(least, 1.0))))


def row_sum(operator: Operator) -> float:
    """A bound of the largest sum of absolute elements in a row of dM."""
    if isinstance(operator, Uniform):
        return abs(operator.value)
    if isinstance(operator, Chain):
        return math.prod(1.0 + row_sum(part) for part in operator.parts) - 1.0
    if isinstance(operator, Diagonal):
        return float(operator.values.abs().max())
    assert isinstance(operator, Blocks)
    return float(operator.blocks.abs().sum(-1).max())


def _turn_into(out: Tensor, x: Tensor, turns: Sequence[Turn], size: Tensor | None) -> None:
    """`out = size · N₁ N₂ … x`, the last turn acting first; x, out: [tokens, columns]."""
    z = x.to(torch.float32, copy=True)
    for operator, factor in reversed(turns):
        z.add_(operator.deviation(z), alpha=factor)
    out.copy_(z if size is None else z.mul_(size))
