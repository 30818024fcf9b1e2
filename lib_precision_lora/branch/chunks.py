"""How much a branch's forward takes per token, and so how many tokens it treats at a time.

Counted in fp32 numbers per token that live at once: i inputs, o outputs, r stacked rank.

    hidden state   i · copies + r                    the input in the product's own type
    additions      o · copies, 2 · (i + o) more where a term is not of low rank
    turned         o for the output in fp32, next to the additions or what an operator takes
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.product import Product, tensor_float_allowed

WORKSPACE_BYTES = 32 * 2**20
"""What the fp32 copies of one block of an activation may take together."""

FP32 = 4


def operand_copies(product: Product, device: torch.device) -> float:
    """fp32 copies of an operand that a product makes on the device: one, or its parts."""
    if product.half:
        return 1.5
    return 3.0 if device.type == "cuda" and tensor_float_allowed(convolution=False) else 1.0


def token_bytes(
    inputs: int, outputs: int, rank: int, steps: Sequence[Add | Left], turns: Iterable[Turn], copies: float
) -> int:
    """Bytes that one token takes in the forward of a linear branch.

    turns: those of the module's input; copies: as `operand_copies` says.
    """
    columns = list(turns)
    whole = [step for step in steps if isinstance(step, Add) and not isinstance(step.term, LowRank)]
    hidden = inputs * copies + rank
    additions = outputs * copies + (2 * (inputs + outputs) if whole else 0)
    lefts = [step.operator for step in steps if isinstance(step, Left)]
    numbers = max(hidden, additions)
    if lefts or columns:
        turning = max((operator_copies(operator) for operator in lefts), default=0.0) * outputs
        numbers = outputs + max(numbers, turning)
    if columns:
        shift = inputs * (3 + max(operator_copies(operator) for operator, _ in columns))
        numbers = max(numbers, outputs + shift, 2.5 * outputs + 0.5 * inputs)
    return int(FP32 * (numbers + 2 * rank))


def token_count(size: int) -> int:
    """How many tokens of this many bytes each are treated at a time."""
    return max(1, WORKSPACE_BYTES // max(1, size))


def operator_copies(operator: Operator) -> float:
    """Copies of the vectors that an operator makes beside them."""
    if isinstance(operator, Chain):
        return 2 + max(operator_copies(part) for part in operator.parts)
    if isinstance(operator, Blocks):
        return 2 if operator.order is None else 4
    return 1
