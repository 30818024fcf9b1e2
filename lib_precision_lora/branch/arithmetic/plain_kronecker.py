"""A Kronecker product beside a linear module in bf16, alone there: products of small factors, and one into y.

    y[(a p)] += scale · Σ left[a, b] · right[p, k] · down[k, q] · x[(b q)]

    hidden = x · downᵀ        [tokens · b, k]; x itself where right is one factor
    mixed  = left · hidden    [tokens, a, k] fp32
    y     += parts · rightᵀ   y seen as [tokens · a, p]; mixed in two parts, one rounding

The left factor mixes k numbers instead of p, and nothing as large as y is made. Parts are those of
`plain_form`: a bf16 factor is one, any other two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.arithmetic import plain_form
from lib_precision_lora.branch.arithmetic.parts import in_parts, part_count
from lib_precision_lora.branch.arithmetic.plain import summed_in_fp32
from lib_precision_lora.branch.arithmetic.product import Compute
from lib_precision_lora.memory.chunks import FP32, WORKSPACE_BYTES
from lib_precision_lora.strict_product import strict

BF16 = torch.bfloat16
CACHED_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class KroneckerForm:
    """apart: hidden leaves two products in two parts, as in `PlainForm`; down_parts, up_parts: of factors, 0
    for a down that is not there; left: [a, b]; inner: k; height: p; width: q."""

    apart: bool
    down_parts: int
    up_parts: int
    left: tuple[int, int]
    inner: int
    height: int
    width: int

    @classmethod
    def of(
        cls, compute: Compute, device: torch.device, activations: torch.dtype, term: Kronecker
    ) -> KroneckerForm | None:
        """None where the products are made in fp32."""
        if activations != BF16 or compute != "auto":
            return None
        card = plain_form.is_card(device)
        if not (plain_form.sums_in_fp32(device) if card else plain_form.multiplies_bf16(device)):
            return None
        up, *down = term.right
        return cls(
            not card,
            part_count(down[0].dtype, BF16) if down else 0,
            part_count(up.dtype, BF16),
            (term.left.shape[0], term.left.shape[1]),
            up.shape[1],
            term.height,
            term.width,
        )

    @property
    def columns(self) -> int:
        return 1 + self.up_parts

    def factor_sizes(self) -> tuple[int, ...]:
        """Bytes of the tensors that are placed: left, down where there is one, right."""
        a, b = self.left
        down = BF16.itemsize * self.down_parts * self.inner * self.width
        sizes = FP32 * a * b, down, BF16.itemsize * self.up_parts * self.height * self.inner
        return tuple(size for size in sizes if size)

    @property
    def chunk_bytes(self) -> int:
        """What a chunk of tokens takes, at most; on a CPU so little that its caches hold it."""
        return CACHED_BYTES if self.apart else WORKSPACE_BYTES

    def columns_bytes(self) -> int:
        """Of the columns that the parts meet, which each forward makes."""
        return BF16.itemsize * self.columns * self.height * self.inner

    def token_bytes(self) -> int:
        """Of one token: hidden as the products leave it and in fp32, beside mixed; or mixed and its parts."""
        a, b = self.left
        halves = BF16.itemsize * (self.down_parts + 1) if self.apart and self.down_parts else 0
        hidden = b * self.inner * (halves + FP32 * (2 if self.down_parts > 1 else 1))
        mixed = a * self.inner * FP32
        parts = a * self.inner * BF16.itemsize * (2 + self.columns)
        return max(hidden + mixed, mixed + b * self.inner * FP32 + parts)


@dataclass(frozen=True, slots=True, eq=False)
class PlainKronecker:
    """Ready on one device. left: [a, b] fp32; down: [parts · k, q] or None; up: [parts, p, k]."""

    form: KroneckerForm
    left: Tensor
    down: Tensor | None
    up: Tensor
    scale: float

    def add(self, x: Tensor, y: Tensor) -> None:
        """`y += branch(x)` in place; x: [tokens, b · q], y: [tokens, a · p], both bf16."""
        columns = torch.cat((self.up[0], *self.up), 1).t()
        at_once = max(1, self.form.chunk_bytes // self.form.token_bytes())
        for start in range(0, x.shape[0], at_once):
            parts = self._parts(x[start : start + at_once])
            self._seen(y[start : start + at_once]).addmm_(parts, columns, alpha=self.scale)

    def with_strengths(self, additions: Sequence[Add]) -> PlainKronecker:
        """The same factors at another strength."""
        return dataclasses.replace(self, scale=additions[0].scale)

    def _seen(self, y: Tensor) -> Tensor:
        return y.view(-1, self.form.height)

    def _parts(self, x: Tensor) -> Tensor:
        """mixed in two parts, and the first once more where `up` has two: [tokens · a, columns · k]."""
        hidden = self._hidden(x.reshape(-1, self.form.width)).view(len(x), -1, self.form.inner)
        mixed = strict(torch.bmm, self.left.expand(len(x), -1, -1), hidden).flatten(0, 1)
        high = mixed.to(BF16)
        low = mixed.sub_(high).to(BF16)
        return torch.cat((high, low, high) if self.form.columns > 2 else (high, low), 1)

    def _hidden(self, x: Tensor) -> Tensor:
        """x: [tokens · b, q]; returned in fp32: [tokens · b, k]."""
        if self.down is None:
            return x.float()
        inner = self.form.inner
        if not self.form.apart:
            hidden = summed_in_fp32(x, self.down.t())
            return hidden[:, :inner] + hidden[:, inner:] if self.form.down_parts > 1 else hidden
        first = torch.mm(x, self.down.t())
        hidden = torch.addmm(first[:, :inner], x, self.down[:inner].t(), beta=-1).float()
        for part in range(self.form.down_parts):
            hidden += first[:, part * inner : (part + 1) * inner]
        return hidden


def single_kronecker(steps: Sequence[Add | Left], rows: int, columns: int) -> Kronecker | None:
    """The Kronecker product that is all that is added to a [rows, columns] weight; None otherwise."""
    if (
        len(steps) != 1
        or not isinstance(step := steps[0], Add)
        or not isinstance(term := step.term, Kronecker)
    ):
        return None
    whole = (step.start, step.stop, step.first) == (0, rows, 0) and term.size == (rows, columns)
    plain = step.row_change is None and not step.columns
    flat = all(factor.ndim == 2 for factor in term.right) and len(term.right) <= 2
    return term if whole and plain and flat else None


def build_kronecker(form: KroneckerForm, step: Add, device: torch.device) -> PlainKronecker:
    """That of a single addition (`single_kronecker`), on the device."""
    assert isinstance(step.term, Kronecker)
    up, *down = step.term.right
    place = partial(torch.Tensor.to, device=device)
    return PlainKronecker(
        form,
        place(step.term.left).float().contiguous(),
        in_parts(place(down[0]), BF16, form.down_parts).flatten(0, 1).contiguous() if down else None,
        in_parts(place(up), BF16, form.up_parts).contiguous(),
        step.scale,
    )
