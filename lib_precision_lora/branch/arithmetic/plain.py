"""A plain stack: two products, and little between them (`plain_form`).

hidden = x · downᵀ
parts  = hidden · scale
y[:, range] += factor · parts[:, columns] · upᵀ
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add
from lib_precision_lora.branch.arithmetic.parts import in_parts
from lib_precision_lora.branch.arithmetic.plain_form import WIDENED_BYTES, PlainForm
from lib_precision_lora.branch.arithmetic.stack import (
    UpBlock,
    balanced_addition,
    rank_of,
    stack_columns,
    turned_factors,
)
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES

LARGEST_FACTOR = 2.0**60
"""Parts that overflow beside it belong to an output far beyond fp16's range."""

SIGNS = torch.tensor([1.0, -1.0])


@dataclass(frozen=True, slots=True, eq=False)
class PlainRange:
    """Rows [start, stop) of the output; columns: their part of the stack; up: [parts, rows, rank of it]."""

    start: int
    stop: int
    columns: slice | Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PlainStack:
    """The low-rank terms of one module on one device, ready for activations of one type.

    down: [parts · rank, inputs]; scale: [rank] fp32; factor: of all; signs: of the two parts of
    hidden, [2], None where it is one, or comes in parts; exponents: the powers of two moved out of each
    rank's factors; even: every scale is 1, so that there is nothing to multiply.
    """

    form: PlainForm
    down: Tensor
    scale: Tensor
    factor: float
    ranges: tuple[PlainRange, ...]
    signs: Tensor | None
    exponents: tuple[int, ...]
    even: bool = False

    @property
    def rank(self) -> int:
        return self.scale.shape[0]

    def add(self, x: Tensor, y: Tensor) -> None:
        """`y += branch(x)` in place; x: [tokens, inputs], y: [tokens, rows], both of the form's type."""
        at_once = max(1, WORKSPACE_BYTES // self.form.token_bytes(self.rank))
        if self.form.widens:
            at_once = min(at_once, max(1, WIDENED_BYTES // (FP32 * x.shape[1])))
        if x.shape[0] <= at_once:
            self._add(x, y)
            return
        for start in range(0, x.shape[0], at_once):
            self._add(x[start : start + at_once], y[start : start + at_once])

    def _add(self, x: Tensor, y: Tensor) -> None:
        """As many tokens as are treated at once; nothing of them is alive when the next are."""
        parts = self._parts_of(x) if self.form.apart else self.parts(self._hidden(x))
        for here in self.ranges:
            rows = y if here.stop - here.start == y.shape[1] else y[:, here.start : here.stop]
            rows.addmm_(self._of(parts, here), self.up(here).t(), alpha=self.factor)

    def with_strengths(self, additions: Sequence[Add]) -> PlainStack:
        """The same factors at other strengths: one short vector."""
        scale, factor, even = _scales(self.form, additions, self.exponents, self.down.shape[1])
        here = scale.to(self.scale.device, copy=True)
        # one by one: `dataclasses.replace` takes longer than all the rest, for each layer
        return PlainStack(self.form, self.down, here, factor, self.ranges, self.signs, self.exponents, even)

    def parts(self, hidden: Tensor) -> Tensor:
        """`hidden · scale` in the type of the activations: [tokens, rank, columns].

        hidden: [tokens, parts · rank]. In bf16 the second column is minus what the first has lost.
        """
        if self.signs is None:
            if hidden.dtype == self.form.activations:
                return hidden.mul_(self.scale)[..., None]
            made = hidden.new_empty(hidden.shape, dtype=self.form.activations)
            return torch.mul(hidden, self.scale, out=made)[..., None]
        first, *rest = hidden.view(len(hidden), -1, self.rank).unbind(1)
        parts = torch.empty(
            (*first.shape, self.form.columns), dtype=self.form.activations, device=hidden.device
        )
        torch.mul(first, self.scale, out=parts[..., 0])
        lost = parts[..., 1]
        torch.addcmul(parts[..., 0], first, self.scale, value=-1, out=lost)
        for low in rest:
            torch.addcmul(lost, low, self.scale, value=-1, out=lost)
        if self.form.columns > 2:
            parts[..., 2].copy_(parts[..., 0])
        return parts

    def _of(self, parts: Tensor, here: PlainRange) -> Tensor:
        """Those of a range of rows, [tokens, rank · columns], in the order of `up`."""
        if len(self.ranges) > 1:
            parts = parts[:, :, here.columns] if self.form.apart else parts[:, here.columns]
        return parts.flatten(1)

    def _parts_of(self, x: Tensor) -> Tensor:
        """The parts of `hidden · scale`, [tokens, columns, rank]: the second is what the first has lost."""
        first = torch.mm(x, self.down.t())
        high = first[:, : self.rank]
        low = torch.addmm(high, x, self.down[: self.rank].t(), beta=-1)
        if self.form.down_parts > 1:
            low += first[:, self.rank :]
        del first
        if not self.even:
            scaled = high * self.scale
            kept = scaled.to(x.dtype)
            high, low = kept, scaled.sub_(kept).addcmul_(low, self.scale).to(x.dtype)
        parts = torch.cat((high, low, high) if self.form.columns > 2 else (high, low), 1)
        return parts.view(len(x), -1, self.rank)

    def up(self, here: PlainRange) -> Tensor:
        """The columns that the parts meet: [rows, rank · columns]; where hidden comes in parts, those of each
        part together."""
        high = here.up[0]
        if self.form.apart:
            return torch.cat((high, *here.up), 1)
        if self.signs is None:
            return high
        made = high.new_empty((*high.shape, self.form.columns))
        torch.mul(high[..., None], self.signs, out=made[..., :2])
        if self.form.columns > 2:
            made[..., 2].copy_(here.up[1])
        return made.flatten(1)

    def _hidden(self, x: Tensor) -> Tensor:
        if self.form.widens:
            return torch.mm(x.float(), self.down.float().t())
        if self.form.narrow or self.form.activations == torch.float32:
            return torch.mm(x, self.down.t())
        return summed_in_fp32(x, self.down.t())


def summed_in_fp32(x: Tensor, w: Tensor) -> Tensor:
    """`x · w` in fp32, of half-precision matrices that are read as they are."""
    return torch.mm(x, w, out_dtype=torch.float32)


def build_plain(
    form: PlainForm,
    additions: Sequence[Add],
    blocks: Iterable[UpBlock],
    device: torch.device,
) -> PlainStack:
    """The stack of these additions on the device, which is asked for no value.

    blocks: the ranges of rows that the same additions concern.
    """
    downs, ups, exponents = [], [], []
    for step in additions:
        up, down, powers = _in_range(form, step)
        exponents += powers
        downs.append(in_parts(down.to(device), form.activations, form.down_parts))
        ups.append(in_parts(up.to(device), form.activations, form.up_parts))
    scale, factor, even = _scales(form, additions, exponents, downs[0].shape[-1])
    ranges = []
    for block in blocks:
        number, first, last = block[0]
        start = additions[number].start + first
        parts = [ups[number][:, first:last] for number, first, last in block]
        up = torch.cat(parts, 2) if len(parts) > 1 else parts[0].contiguous()
        columns = stack_columns([number for number, _, _ in block], additions, device)
        ranges.append(PlainRange(start, start + last - first, columns, up))
    down = torch.cat(downs, 1) if len(downs) > 1 else downs[0]
    return PlainStack(
        form,
        down.flatten(0, 1),
        scale.to(device, copy=True),
        factor,
        tuple(ranges),
        SIGNS.to(device, form.activations, copy=True) if form.signed else None,
        tuple(exponents),
        even,
    )


def _in_range(form: PlainForm, step: Add) -> tuple[Tensor, Tensor, list[int]]:
    """`up · down = up' · diag(2^e) · down'`: the factors for the form's products, and e for each rank.

    In fp16 the largest element of each row of down' and of each column of up' lies in [0.5, 1); where hidden
    is fp16, too, it is the sum of absolute elements for the rows of down'.
    """
    if form.activations != torch.float16:
        balanced = balanced_addition(step)
        return balanced.up, balanced.down, [balanced.exponent] * balanced.down.shape[0]
    up, down = turned_factors(step)
    sizes = down.abs().sum(1, dtype=torch.float64) if form.narrow else _largest(down, 1)
    down_exponents, up_exponents = _exponents(sizes), _exponents(_largest(up, 0))
    return (
        torch.ldexp(up.float(), -up_exponents),
        torch.ldexp(down.float(), -down_exponents[:, None]),
        (up_exponents + down_exponents).tolist(),
    )


def _largest(factor: Tensor, axis: int) -> Tensor:
    low, high = factor.aminmax(dim=axis)
    return torch.maximum(high, -low).double()


def _exponents(sizes: Tensor) -> Tensor:
    """The e with `2^(e−1) ≤ size < 2^e`; 0 for 0. sizes: fp64."""
    return torch.frexp(sizes).exponent


def _scales(
    form: PlainForm, additions: Sequence[Add], exponents: Sequence[int], inputs: int
) -> tuple[Tensor, float, bool]:
    """The scale of each rank, [rank] fp32 on the CPU; what the second product is multiplied by; whether each
    scale is 1.

    In fp16 |hidden| is at most 65504 · inputs, or 65504 where it is fp16 itself, and the factor keeps parts
    at or below 65504. It takes the largest scale along: those of one strength then are powers of two, and
    round nothing. Where hidden comes in parts, the factor is the largest scale, and those of one strength
    are 1.
    """
    strengths = [step.scale for step in additions for _ in range(rank_of(step))]
    scales = strengths
    if any(exponents):
        scales = [math.ldexp(strength, e) for strength, e in zip(strengths, exponents, strict=True)]
    half = form.activations == torch.float16
    factor = max(scales, key=abs, default=0.0) if half or form.apart else 1.0
    factor = abs(factor) if half else factor
    if factor == 0.0:
        factor = 1.0
    elif form.apart:
        factor = factor if 1.0 / LARGEST_FACTOR <= abs(factor) <= LARGEST_FACTOR else 1.0
    elif half:
        factor = min(factor if form.narrow else math.ldexp(factor, inputs.bit_length()), LARGEST_FACTOR)
    if all(scale == factor for scale in scales):
        return torch.ones(len(scales), dtype=torch.float32), factor, True
    return torch.tensor([scale / factor for scale in scales], dtype=torch.float32), factor, False
