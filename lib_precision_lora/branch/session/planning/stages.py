"""What a forward of a branch takes at its stages, of which one follows the other.

A stage holds several uses of memory at once, each `min(positions · bytes of one, at most)`; a forward takes
what its largest stage takes.

    linear   one: a chunk of tokens (`chunks.token_bytes`)
    plain    x in fp32, where it is; hidden and its parts; the parts and the columns that they meet
    turned   the module's input, where it is turned before: it stands next to every other stage
    conv     hidden    the stack's hidden state of a sample, from blocks of input channels
             base      one more pass through the module, of the turned input, or of blocks of its patches
             outputs   chunks of positions; of all at once, for what is not of low rank
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.arithmetic.chunks import (
    Arithmetic,
    mixing,
    operator_copies,
    token_bytes,
    turned_copies,
    turning_copies,
    whole_terms,
)
from lib_precision_lora.branch.arithmetic.plain_form import PLAIN_HIDDEN_BYTES, WIDENED_BYTES, PlainForm
from lib_precision_lora.branch.arithmetic.product_cost import Copies, ProductCost
from lib_precision_lora.branch.forward.turned_input import block_bytes
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes for each position (token), and the bound that they keep; None where they keep none.

    beyond: so many positions take none.
    """

    position_bytes: float
    at_most: float | None = None
    beyond: float = 0.0

    def size(self, positions: int) -> float:
        size = positions * self.position_bytes if positions > self.beyond else 0.0
        return size if self.at_most is None else min(size, self.at_most)


Stage = tuple[Use, ...]

MOST_SAMPLES = 64
"""Of a batch, as far as hidden states of several are counted."""


def largest(stages: Sequence[Stage], positions: int) -> int:
    """Bytes of the stage that takes most."""
    return int(max((sum(use.size(positions) for use in stage) for stage in stages), default=0))


def linear_stage(size: int, at_most: int = WORKSPACE_BYTES) -> Stage:
    """size, at_most: `chunks.token_bytes` and `chunks.chunk_bytes` of the branch."""
    return (Use(size, at_most),)


def plain_stages(form: PlainForm, rank: int, inputs: int, columns: int) -> Iterator[Stage]:
    """Those of a plain stack beside a linear module. columns: bytes of those that a forward makes."""
    hidden, parts = form.hidden_bytes(rank), form.parts_bytes(rank)
    if form.widens:
        down = form.widened_bytes(rank, inputs)
        yield Use(FP32 * inputs, WIDENED_BYTES), Use(down, down), Use(hidden, WORKSPACE_BYTES)
    yield (Use(hidden + parts, WORKSPACE_BYTES),)
    yield Use(parts or hidden, WORKSPACE_BYTES), Use(columns, columns)


def plain_conv_stages(form: PlainForm, rank: int) -> Iterator[Stage]:
    """Those of a plain stack beside a convolution: of one sample, or of as many as keep within a bound."""
    hidden = form.hidden_bytes(rank)
    yield (Use(hidden),)
    yield (Use(hidden * MOST_SAMPLES, PLAIN_HIDDEN_BYTES),)


def turned_input_stages(
    inputs: int, turns: Sequence[Turn], arithmetic: Arithmetic, cost: ProductCost, beside: Sequence[Stage]
) -> Iterator[Stage]:
    """Those of a module that is given its input turned. inputs: channels; cost: of the module's products.

    beside: those of what is added to its output, while the turned input is still there.
    """
    given = Use(FP32 * inputs)
    yield given, Use(FP32 * inputs * turning_copies(turns, cost), block_bytes(arithmetic.device))
    for stage in beside:
        yield given, *stage


def conv_stages(
    weight: EffectiveWeight, rank: int, cost: ProductCost, before: bool = False
) -> Iterator[Stage]:
    """The stages of a convolution's forward, of one sample; positions: those of its output.

    rank: of its stack; before: the module is given its input turned.
    """
    outputs, channels = weight.stored.shape[:2]
    columns = channels * math.prod(weight.stored.shape[2:])
    turns = [] if before else [turn for piece in weight.pieces for turn in piece.turns]
    by_patch = any(operator.mixes for operator, _ in all_turns(weight))
    hidden = Use(FP32 * rank)
    if rank:
        yield _convolved(channels, rank, None, cost.stack)
    kept = [hidden]
    if turns and by_patch:
        size = 2.5 + turned_copies(turns, cost) - cost.cast
        block = Use(FP32 * columns * size, WORKSPACE_BYTES / 4 * size)
        yield hidden, Use(FP32 * 2 * outputs), block
        yield hidden, Use(FP32 * 3 * outputs)
    elif turns:
        kept.append(Use(FP32 * (outputs + 1)))
        yield *kept, Use(FP32 * channels * turned_copies(turns, cost))
    turned = bool(turns) or any(isinstance(step, Left) for step in weight.steps)
    whole = whole_terms(weight.steps)
    if not whole and not by_patch:
        chunk = token_bytes(channels, outputs, rank, weight.steps, turns, cost, convolution=True)
        yield *kept, Use(chunk, WORKSPACE_BYTES)
        return
    if turned:
        kept.append(Use(FP32 * outputs))
        lefts = [operator_copies(step.operator, cost) for step in weight.steps if isinstance(step, Left)]
        yield *kept, Use(FP32 * outputs * max(lefts, default=0.0))
    if rank:
        inner = Use(FP32 * rank * cost.stack.inner)
        yield *kept, inner, _output_block(outputs, cost.stack.result)
        kept.append(_output_block(outputs, 1.0))
    for step in whole:
        yield *kept, *_whole_term(step, channels, outputs, cost, by_patch)


def _whole_term(step: Add, channels: int, outputs: int, cost: ProductCost, by_patch: bool) -> Stage:
    """One addition that is not of low rank, to all positions."""
    turned = 0.0 if by_patch else turned_copies(step.columns, cost)
    given = Use(FP32 * channels * turned)
    if not isinstance(step.term, Kronecker):
        return given, *_convolved(channels, outputs, WORKSPACE_BYTES / 2, cost.strict)
    inner = step.term.left.shape[1] * step.term.height
    return given, _channel_block(channels, cost.strict), Use(FP32 * mixing(inner, outputs, cost))


def _convolved(channels: int, outputs: int, at_most: float | None, copies: Copies) -> Stage:
    """A convolution in blocks of input channels (`conv.convolve`), where there are several: the sum so far,
    what the next one gives, and the block that it is made of. at_most: bytes of the result, if it is bounded.

    An input of stride 2 has four times the positions of the output.
    """
    blocks_beyond = WORKSPACE_BYTES / (8 * channels) / 4
    made = None if at_most is None else at_most * copies.result
    return (
        Use(FP32 * outputs, at_most, blocks_beyond),
        Use(FP32 * outputs * copies.result, made),
        _channel_block(channels, copies),
    )


def _channel_block(channels: int, copies: Copies) -> Use:
    """The block of input channels that `conv.convolve` brings to the product's type at a time."""
    return Use(FP32 * channels * copies.operand, WORKSPACE_BYTES / 2 * copies.operand)


def _output_block(outputs: int, copies: float) -> Use:
    """The block of rows that `rows.add_rows` treats at a time."""
    return Use(FP32 * outputs * copies, WORKSPACE_BYTES / 2 * copies)


def all_turns(weight: EffectiveWeight) -> list[Turn]:
    turns = [turn for piece in weight.pieces for turn in piece.turns]
    return turns + [turn for step in weight.steps if isinstance(step, Add) for turn in step.columns]
