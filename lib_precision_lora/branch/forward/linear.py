"""The branch of a linear module: `y += (x · downᵀ · diag(scale)) · upᵀ + …`, in token chunks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lib_precision_lora.adapters.steps import Turn
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.arithmetic.product import SingleProduct, magnitude
from lib_precision_lora.branch.arithmetic.token_chunks import token_chunks
from lib_precision_lora.branch.forward.operands import Operands
from lib_precision_lora.branch.forward.rows import add_rows
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.forward.wide_input import WideInput
from lib_precision_lora.strict_product import strict

LARGEST_ENLARGED = 2.0**5

WHOLE = sys.maxsize
"""As many tokens as there are."""


class LinearBranch(WeightBranch):
    """Runs on the input and the output of a module whose forward multiplies by a [out, in] weight."""

    can_turn = True
    adds_kronecker = True

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)`, in y's memory where y is contiguous; x: [..., in], y: [..., out]."""
        operands = self.operands(x, y)
        if isinstance(operands, Operands) and operands.is_empty:
            return y
        y = y.contiguous()
        if not isinstance(operands, Operands):
            for x_part, y_part in token_chunks(x, y, WHOLE):
                operands.add(x_part, y_part)
            return y
        bias: Tensor | None = getattr(module, "bias", None)
        for x_chunk, y_chunk in token_chunks(x, y, operands.at_once):
            self._add(module, operands, x_chunk, y_chunk, bias)
        return y

    def _add(self, module: nn.Module, operands: Operands, x: Tensor, y: Tensor, bias: Tensor | None) -> None:
        """One chunk of tokens, in place; nothing of it is alive when the next begins."""
        add_rows(operands, LinearInput(module, operands, x, self.wide_input), y, bias, (0, y.shape[-1]))


class LinearInput:
    """One chunk of tokens, [tokens, in] (`rows.BranchInput`)."""

    def __init__(self, module: Any, operands: Operands, x: Tensor, wide: WideInput | None) -> None:
        self.module, self.operands, self.wide = module, operands, wide
        self.x = x if wide is None else wide.completed(x)

    def hidden(self) -> Tensor | None:
        down, scale = self.operands.down, self.operands.scale
        if down is None or scale is None:
            return None
        return self.operands.product(linear, self.x, down, (-1,)).mul_(scale)

    def dense(self, rows: Tensor, turns: Sequence[Turn]) -> Tensor:
        return SingleProduct()(linear, turned(self.x.float(), turns), rows.to(self.x.device), (-1,))

    def kronecker(self, term: Kronecker, turns: Sequence[Turn]) -> Tensor:
        inner = turned(self.x.float(), turns).view(self.x.shape[0], term.left.shape[1], -1)
        for factor in reversed(term.right):
            inner = SingleProduct()(linear, inner, factor.flatten(1), (-1,))
        return mix_left(term, inner)

    def base(self, turns: Sequence[Turn]) -> Tensor:
        shift = turn(self.x.float(), turns)
        size = enlargement(shift, (-1,))
        shift = (shift * size).to(self.x.dtype)
        y: Tensor = self.module.forward(shift if self.wide is None else self.wide.own_part(shift)).float()
        bias = getattr(self.module, "bias", None)
        return (y if bias is None else y.sub_(bias.to(y))).div_(size)


def mix_left(term: Kronecker, inner: Tensor) -> Tensor:
    """`Σ left[a, b] · inner[:, b, p]`: [tokens, a · p]; inner: [tokens, b, p] fp32."""
    mixed = strict(partial(torch.einsum, "ab,tbp->tap"), term.left.float(), inner)
    return mixed.flatten(1)


def turn(x: Tensor, turns: Sequence[Turn]) -> Tensor:
    """`N₁ N₂ … x − x` for turns (N₁, N₂, …), the last acting first; x: [..., columns] fp32."""
    total = torch.zeros_like(x)
    for operator, factor in reversed(turns):
        total.add_(operator.deviation(x + total), alpha=factor)
    return total


def enlargement(shift: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The power of two s ≥ 1 for which `(module(s · shift) − b) / s` rounds least: s · shift is large.

    A small shift alone would leave the module as `W0 · shift + b`, rounded at the size of the bias, and in
    fp16 might be below the normal range. s · shift stays at or below LARGEST_ENLARGED, so that no output
    leaves the range of fp16 that would not without s, on rows of absolute sum up to 2000.
    axes: those over which one s is common, kept as axes of 1.
    """
    return (LARGEST_ENLARGED / magnitude(shift, axes)).clamp(1.0, 2.0**24)


def turned(x: Tensor, turns: Sequence[Turn]) -> Tensor:
    """`N₁ N₂ … x`; x: [..., columns] fp32."""
    return x + turn(x, turns) if turns else x
