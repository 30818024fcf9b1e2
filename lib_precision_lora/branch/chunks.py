"""How much a branch's forward takes per token, and so how many tokens it treats at a time.

Counted in fp32 numbers per token that live at once: i inputs, o outputs, r stacked rank.

    hidden state   i · copies + r                    the input in the product's own type
    additions      o · copies, and next to them what a term takes that is not of low rank
      dense        i · copies + o · copies
      Kronecker    the largest two results that follow each other, the mixed one twice
    turned         o for the output in fp32, next to the additions or what an operator takes

A convolution's chunk is one of positions, whose hidden state is made beforehand (`stages.conv_stages`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Kronecker, LowRank
from lib_precision_lora.branch.product import Product
from lib_precision_lora.memory.chunks import (
    BLOCK_COPIES,
    FP32,
    HALF_COPIES,
    ORDERED_BLOCK_COPIES,
    SCALE_COPIES,
    SINGLE_COPIES,
    SPLIT_COPIES,
    chain_copies,
)
from lib_precision_lora.strict_product import takes_parts


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How factors are multiplied on a device.

    half: in fp16; copies, conv_copies: fp32 copies of an operand that a product makes in a linear module and
    in a convolution, one or its parts; widens: fp16 factors are multiplied in fp32, as CPUs do.
    """

    half: bool
    copies: float
    conv_copies: float
    widens: bool

    @classmethod
    def of(cls, product: Product, device: torch.device) -> Arithmetic:
        linear, conv = (operand_copies(product, device, convolution) for convolution in (False, True))
        return cls(product.half, linear, conv, device.type == "cpu")


def operand_copies(product: Product, device: torch.device, convolution: bool) -> float:
    """fp32 copies of an operand that a product makes on the device: one, or its parts.

    convolution: in the forward of one, which multiplies by matrices as well.
    """
    if product.half:
        return HALF_COPIES
    parts = takes_parts(device, False) or (convolution and takes_parts(device, True))
    return SPLIT_COPIES if parts else SINGLE_COPIES


def token_bytes(
    inputs: int,
    outputs: int,
    rank: int,
    steps: Sequence[Add | Left],
    turns: Iterable[Turn],
    copies: float,
    convolution: bool = False,
) -> int:
    """Bytes that one token takes in the forward of a linear branch, next to others of its chunk.

    turns: those of the module's input; copies: as `operand_copies` says; convolution: one position in that
    of a convolution, next to what is made for all positions at once.
    """
    columns = list(turns)
    hidden = rank * copies if convolution else inputs * copies + rank
    additions = max((_whole_term(step, inputs, outputs, copies) for step in whole_terms(steps)), default=0.0)
    if rank or not additions:
        additions += outputs * copies
    lefts = [step.operator for step in steps if isinstance(step, Left)]
    numbers = max(hidden, additions)
    if lefts or columns:
        turning = max((operator_copies(operator) for operator in lefts), default=0.0) * outputs
        numbers = outputs + max(numbers, turning)
    if columns and not convolution:
        base = max(inputs * turned_copies(columns), inputs + 2.0 * outputs)
        numbers = max(numbers, outputs + base)
    elif columns:
        numbers = max(numbers, 3.0 * outputs)
    return int(FP32 * (numbers + 2 * rank))


def whole_terms(steps: Sequence[Add | Left]) -> list[Add]:
    """The additions that are not of low rank."""
    return [step for step in steps if isinstance(step, Add) and not isinstance(step.term, LowRank)]


def _whole_term(step: Add, inputs: int, outputs: int, copies: float) -> float:
    """What one addition takes that is not of low rank, with its result."""
    turned = inputs * turned_copies(step.columns)
    if not isinstance(step.term, Kronecker):
        return max(turned, inputs * copies + outputs * max(copies, 2.0))
    left, right = step.term.left, step.term.right
    sizes = [inputs, *(left.shape[1] * factor.shape[0] for factor in reversed(right))]
    products = [before * max(copies, 1.0) + after * copies for before, after in pairwise(sizes)]
    mixed = left.shape[0] * step.term.height
    return max(turned, *products, 2.0 * sizes[-1] + mixed, sizes[-1] + 2.0 * mixed)


def turned_copies(turns: Sequence[Turn]) -> float:
    """Copies of an input that turning it makes: itself in fp32, the shift, their sum, and the operators'."""
    return 3.0 + max(operator_copies(operator) for operator, _ in turns) if turns else 0.0


def operator_copies(operator: Operator) -> float:
    """Copies of the vectors that an operator makes beside them."""
    if isinstance(operator, Chain):
        return chain_copies(operator_copies(part) for part in operator.parts)
    if isinstance(operator, Blocks):
        return BLOCK_COPIES if operator.order is None else ORDERED_BLOCK_COPIES
    return SCALE_COPIES
