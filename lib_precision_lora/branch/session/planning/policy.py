"""Which layers are merged instead of run beside: the policy for full-precision checkpoints.

    branch   none
    merge    every dense fp16 or fp32 linear, conv or embedding layer
    auto     those of them where a branch would cost too much of what the layer does itself:
             on a CPU more than a quarter of its multiplications
             on a card, for a model that makes images in steps, more than a twentieth of its time by
             `card_cost`, which counts launches and bytes beside multiplications

A merge costs a pass over the layer at every change of a strength, and one rounding; a branch costs its
products at every step. bf16 and low-bit layers are never merged: their rounding would lose the LoRA.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Kronecker, LowRank
from lib_precision_lora.branch.arithmetic.stack import low_rank
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.session.planning.card_cost import branch_cost, layer_cost
from lib_precision_lora.branch.session.sites import Site

DensePolicy = Literal["branch", "merge", "auto"]

MERGED_TYPES = (torch.float32, torch.float16)

WORTH_A_MERGE = 0.25
"""The part of a layer's own multiplications above which `auto` merges."""

WORTH_A_MERGE_ON_A_CARD = 0.05
"""The part of a layer's own time on a card above which `auto` merges there."""

SMALL_LAYER = 256 * 256
"""Below so many weights multiplications say nothing about time, and `auto` merges nothing on a CPU."""


def process_device() -> torch.device:
    """The device on which a process runs its models if nobody says otherwise: its card, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def steps_on_a_card(stepped: object, device: torch.device) -> bool:
    """A card runs the model many times for one set of LoRAs.

    stepped: the model's part of which a forward is a step; None for text encoders, which run once, so that
    a merge would cost more. device: the one on which models run. It is not read from the weights: they may
    be brought to the card later. A card is a CUDA or ROCm device: `card_cost` knows no other.
    """
    return stepped is not None and device.type == "cuda"


def merges(policy: DensePolicy, site: Site, branch: WeightBranch, alone: bool, card: bool = False) -> bool:
    """Whether this module is merged. branch: what runs otherwise; alone: module and parameters stand at
    one place of the model alone; at another they would be read unmerged, or be merged a second time.
    card: `steps_on_a_card`."""
    if policy == "branch" or not alone or branch.wide_input is not None or not _dense(site.module):
        return False
    if policy == "merge":
        return True
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    if site.kind == "embedding":
        return False
    cost = multiplications(branch, columns, weight.dtype)
    if card:
        own = layer_cost(rows, columns, weight.shape[1])
        beside = branch_cost(cost, rows, weight.shape[1], _others(branch))
        return beside > WORTH_A_MERGE_ON_A_CARD * own
    return rows * columns >= SMALL_LAYER and cost > WORTH_A_MERGE * rows * columns


def _others(branch: WeightBranch) -> int:
    """Steps and turns that are not plain additions of low rank."""
    turns = sum(len(piece.turns) for piece in branch.pieces)
    return turns + len(branch.steps) - len(low_rank(branch.steps))


def multiplications(branch: WeightBranch, columns: int, dtype: torch.dtype) -> int:
    """What a branch multiplies per token (per position of a convolution); columns, dtype: of the weight.

    An input that is turned before the module costs no second pass through it.
    """
    again = 0 if branch.turns_before(dtype) else branch.rows * columns
    passes = sum(again + _turned(piece.turns) for piece in branch.pieces if piece.turns)
    return passes + sum(_step(step) for step in branch.steps)


def shared(model: nn.Module) -> Collection[int]:
    """The identities of parameters that stand at several places of the model."""
    places = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {identity for identity, count in places.items() if count > 1}


def _dense(module: nn.Module) -> bool:
    """Whether weight and bias are plain parameters, of a type that is merged, read where they stand."""
    for attribute in ("weight", "bias"):
        parameter = module._parameters.get(attribute)
        if parameter is None:
            if attribute == "weight":
                return False
            continue
        if type(parameter) is not nn.Parameter or parameter.dtype not in MERGED_TYPES:
            return False
        if getattr(module, attribute) is not parameter:
            return False
    return True


def _step(step: Add | Left) -> int:
    if isinstance(step, Left):
        return sum(tensor.numel() for tensor in step.operator.tensors())
    rows, columns = step.stop - step.start, step.term.size[1]
    if isinstance(step.term, LowRank):
        return step.term.rank * (rows + columns)
    if isinstance(step.term, Kronecker):
        left, height = step.term.left, step.term.height
        inner = left.shape[1] * sum(factor.numel() for factor in step.term.right)
        return inner + left.numel() * height + _turned(step.columns)
    return rows * columns + _turned(step.columns)


def _turned(turns: Sequence[Turn]) -> int:
    return sum(tensor.numel() for operator, _ in turns for tensor in operator.tensors())
