"""How much a branch's forward takes per token, and so how many tokens it treats at a time.

Counted in fp32 numbers per token that live at once: i inputs, o outputs, r stacked rank.

    hidden state   i · operand + r · result          the input in the product's own type
    additions      o · result, and next to them what a term takes that is not of low rank
      dense        i · (1 + inner) + o · result
      Kronecker    the largest two results that follow each other, the mixed one twice
    turned         o for the output in fp32, next to the additions or what an operator takes

operand, inner and result are those of `product_cost.Copies`.

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
from lib_precision_lora.branch.arithmetic.plain_form import PlainForm
from lib_precision_lora.branch.arithmetic.product import Compute, choose_product
from lib_precision_lora.branch.arithmetic.product_cost import ProductCost
from lib_precision_lora.branch.arithmetic.stack import factor_types
from lib_precision_lora.memory.chunks import (
    BLOCK_COPIES,
    FP32,
    ORDERED_BLOCK_COPIES,
    SCALE_COPIES,
    WORKSPACE_BYTES,
    chain_copies,
)

CACHED_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How factors are multiplied on a device.

    half: in fp16; widens: fp16 factors are multiplied in fp32, as CPUs do; linear, conv: what products cost
    in the forward of a linear module, and of a convolution. dtype: of the activations.
    """

    compute: Compute
    device: torch.device
    dtype: torch.dtype
    half: bool
    widens: bool
    linear: ProductCost
    conv: ProductCost

    @classmethod
    def of(cls, compute: Compute, device: torch.device, dtype: torch.dtype) -> Arithmetic:
        product = choose_product(compute, device, dtype)
        linear, conv = (ProductCost.of(product, device, convolution, dtype) for convolution in (False, True))
        return cls(compute, device, dtype, product.half, device.type == "cpu", linear, conv)

    def plain_form(self, steps: Sequence[Add | Left], convolution: bool) -> PlainForm | None:
        """That of a plain stack of these steps."""
        return PlainForm.of(self.compute, self.device, self.dtype, factor_types(steps), convolution)


def token_bytes(
    inputs: int,
    outputs: int,
    rank: int,
    steps: Sequence[Add | Left],
    turns: Iterable[Turn],
    cost: ProductCost,
    convolution: bool = False,
) -> int:
    """Bytes that one token takes in the forward of a linear branch, next to others of its chunk.

    turns: those of the module's input; cost: of its products; convolution: one position in that of a
    convolution, next to what is made for all positions at once.
    """
    columns, stack = list(turns), cost.stack
    hidden = 0.0 if convolution else inputs * stack.operand + rank * stack.result
    additions = max((_whole_term(step, inputs, outputs, cost) for step in whole_terms(steps)), default=0.0)
    if rank or not additions:
        additions += outputs * stack.result
    lefts = [step.operator for step in steps if isinstance(step, Left)]
    numbers = max(hidden, additions)
    if lefts or columns:
        turning = max((operator_copies(operator, cost) for operator in lefts), default=0.0) * outputs
        numbers = outputs + max(numbers, turning)
    if columns and not convolution:
        base = max(inputs * turned_copies(columns, cost), inputs + 2.0 * outputs)
        numbers = max(numbers, outputs + base)
    elif columns:
        numbers = max(numbers, 3.0 * outputs)
    return int(FP32 * (numbers + rank * (1.0 + max(1.0, stack.inner))))


def chunk_bytes(device: torch.device, steps: Sequence[Add | Left], turns: Sequence[Turn]) -> int:
    """What a chunk of tokens takes, at most: on a CPU so little that its caches hold it.

    turns: as for `token_bytes`. What each chunk reads again, dense terms by row block or the module itself,
    is read for as few of them as may be.
    """
    read_again = bool(turns) or any(not isinstance(step.term, Kronecker) for step in whole_terms(steps))
    return WORKSPACE_BYTES if device.type != "cpu" or read_again else CACHED_BYTES


def whole_terms(steps: Sequence[Add | Left]) -> list[Add]:
    """The additions that are not of low rank."""
    return [step for step in steps if isinstance(step, Add) and not isinstance(step.term, LowRank)]


def _whole_term(step: Add, inputs: int, outputs: int, cost: ProductCost) -> float:
    """What one addition takes that is not of low rank, with its result."""
    strict, turned = cost.strict, inputs * turned_copies(step.columns, cost)
    if not isinstance(step.term, Kronecker):
        return max(turned, inputs * (1.0 + strict.inner) + outputs * max(strict.result, 2.0))
    left, right = step.term.left, step.term.right
    sizes = [inputs, *(left.shape[1] * factor.shape[0] for factor in reversed(right))]
    products = [before * (1.0 + strict.inner) + after * strict.result for before, after in pairwise(sizes)]
    return max(turned, *products, mixing(sizes[-1], left.shape[0] * step.term.height, cost))


def mixing(inner: float, mixed: float, cost: ProductCost) -> float:
    """What the left factor of a Kronecker product takes: `inner` numbers become `mixed` ones.

    The product has its own copy of them, and then its result is laid out anew.
    """
    return max(inner * (2.0 + cost.strict.inner) + mixed * cost.strict.result, inner + 2.0 * mixed)


def turned_copies(turns: Sequence[Turn], cost: ProductCost) -> float:
    """Copies of an input that turning it makes: itself in fp32, the shift, their sum, and the operators'."""
    if not turns:
        return 0.0
    return cost.cast + 2.0 + max(operator_copies(operator, cost) for operator, _ in turns)


def turning_copies(turns: Sequence[Turn], cost: ProductCost) -> float:
    """Copies of an fp32 input beside the one that is turned in place: those that the operators make."""
    return max(operator_copies(operator, cost) for operator, _ in turns)


def operator_copies(operator: Operator, cost: ProductCost) -> float:
    """Copies of the vectors that an operator makes beside them."""
    if isinstance(operator, Chain):
        return chain_copies(operator_copies(part, cost) for part in operator.parts)
    if isinstance(operator, Blocks):
        parts = max(0.0, cost.strict.inner + cost.strict.result - 2.0)
        return parts + (BLOCK_COPIES if operator.order is None else ORDERED_BLOCK_COPIES)
    return SCALE_COPIES
