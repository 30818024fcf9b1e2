"""A change of strengths alone, where all that is attached adds to weights: numbers change, and nothing else.

No layer is looked at but for whether its module is the same, no branch is made, and no factor is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.adapters.loha import LoHa
from lib_precision_lora.adapters.lokr import LoKr
from lib_precision_lora.adapters.lora import LoRA
from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.branch.algebra.number_range import bound_of, require_range
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.session.attach import Attached
from lib_precision_lora.branch.session.compose import out_of_memory
from lib_precision_lora.branch.session.patch import Patch
from lib_precision_lora.branch.session.sites import module_at
from lib_precision_lora.branch.session.undo import Undo, run_back
from lib_precision_lora.ticks import Steps, Tick

ADDITIVE = (LoRA, LoHa, LoKr)
"""Adapters whose every strength adds the same term, so many times."""

Exchange = tuple[str, WeightBranch, tuple[Add, ...]]
"""A module's name, what stands there, and the steps that it is to have."""


def exchange_strengths(
    model: nn.Module,
    attached: Mapping[str, Attached],
    before: Sequence[Patch],
    after: Sequence[Patch],
    memo: Memo,
    tick: Tick,
) -> bool:
    """Give what stands there the strengths of `after`; False, and nothing done, where more than that differs,
    or where a strength is to be refused.

    before: what is attached; memo: has the largest numbers of its factors. What the tick raises leaves
    everything as it was.
    """
    exchanges = _exchanges(model, attached, before, after, memo)
    if exchanges is None:
        return False
    undo: Undo = []
    step = Steps(len(exchanges), tick)
    try:
        for name, branch, steps in exchanges:
            step()
            undo.append(partial(vars(branch).update, dict(vars(branch))))
            try:
                branch.take_steps(steps)
            except torch.cuda.OutOfMemoryError as error:
                raise out_of_memory(name, branch.factor_bytes, error) from error
    except BaseException:
        run_back(undo)
        raise
    return True


def _exchanges(
    model: nn.Module,
    attached: Mapping[str, Attached],
    before: Sequence[Patch],
    after: Sequence[Patch],
    memo: Memo,
) -> list[Exchange] | None:
    """The modules of which a strength differs; None where more than that does."""
    stacks: dict[str, list[tuple[Patch, Patch]]] = {}
    if len(before) != len(after):
        return None
    for was, patch in zip(before, after, strict=True):
        if not _differs_in_strength_at_most(was, patch):
            return None
        if patch.strength != 0.0:
            stacks.setdefault(patch.target.parameter, []).append((was, patch))
    if stacks.keys() != {f"{path}.weight" for path in attached}:
        return None
    found: list[Exchange] = []
    for path, here in attached.items():
        piece = here.piece
        if not isinstance(piece, WeightBranch) or here.module() is not module_at(model, path):
            return None
        steps = _steps(piece, stacks[f"{path}.weight"], memo)
        if steps is None:
            return None
        if steps != piece.steps:
            found.append((path, piece, steps))
    return found


def _differs_in_strength_at_most(was: Patch, patch: Patch) -> bool:
    """Whether both add the same, at some strength or both at none."""
    return (
        was.adapter is patch.adapter
        and was.target == patch.target
        and was.base_factor == patch.base_factor == 1.0
        and not (was.widens or patch.widens)
        and (was.strength == 0.0) == (patch.strength == 0.0)
        and isinstance(patch.adapter, ADDITIVE)
    )


def _steps(branch: WeightBranch, stack: Sequence[tuple[Patch, Patch]], memo: Memo) -> tuple[Add, ...] | None:
    """The branch's steps with the new strengths; None where they are not what the stack has made, one by one,
    or where a strength is to be refused."""
    if branch.bias is not None or branch.wide_input is not None or len(branch.steps) != len(stack):
        return None
    steps = []
    for step, (was, patch) in zip(branch.steps, stack, strict=True):
        adapter = patch.adapter
        assert isinstance(adapter, ADDITIVE)
        if not isinstance(step, Add) or step.scale != was.strength * adapter.scale:
            return None
        if was.strength != patch.strength:
            step = dataclasses.replace(step, scale=patch.strength * adapter.scale)
            try:
                require_range(step, partial(bound_of, memo))
            except AdapterError:
                return None
        steps.append(step)
    return tuple(steps)
