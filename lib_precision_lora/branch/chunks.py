"""What the steps of an effective weight take in a forward, as `memory.chunks` counts it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.branch.product import Product, tensor_float_allowed
from lib_precision_lora.memory.chunks import (
    BLOCK_COPIES,
    HALF_COPIES,
    ORDERED_BLOCK_COPIES,
    SCALE_COPIES,
    SINGLE_COPIES,
    SPLIT_COPIES,
    Load,
    chain_copies,
)


def operand_copies(product: Product, device: torch.device) -> float:
    """fp32 copies of an operand that a product makes on the device: one, or its parts."""
    if product.half:
        return HALF_COPIES
    split = device.type == "cuda" and tensor_float_allowed(convolution=False)
    return SPLIT_COPIES if split else SINGLE_COPIES


def load(
    inputs: int, outputs: int, rank: int, steps: Sequence[Add | Left], turns: Iterable[Turn], copies: float
) -> Load:
    """What these steps put beside a weight of [outputs, inputs · kernel].

    turns: those of the module's input; copies: as `operand_copies` says.
    """
    lefts = [operator_copies(step.operator) for step in steps if isinstance(step, Left)]
    return Load(
        outputs,
        inputs,
        rank,
        copies,
        whole=any(isinstance(step, Add) and not isinstance(step.term, LowRank) for step in steps),
        left=max(lefts, default=None),
        turn=max((operator_copies(operator) for operator, _ in turns), default=None),
    )


def operator_copies(operator: Operator) -> float:
    """Copies of the vectors that an operator makes beside them."""
    if isinstance(operator, Chain):
        return chain_copies(operator_copies(part) for part in operator.parts)
    if isinstance(operator, Blocks):
        return BLOCK_COPIES if operator.order is None else ORDERED_BLOCK_COPIES
    return SCALE_COPIES
