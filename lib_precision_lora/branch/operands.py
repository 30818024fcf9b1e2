"""What a branch multiplies: one module's effective weight and bias, made ready for one device and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.terms import Segment
from lib_precision_lora.branch.effective import EffectiveWeight
from lib_precision_lora.branch.product import Compute, Product, choose_product
from lib_precision_lora.branch.stack import Stack, StackLayout, build_stack
from lib_precision_lora.branch.vector import DeltaVector


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """A stack with its scales, dense remainders and bias, on one device, for one activation type."""

    product: Product
    segments: tuple[Segment, ...]
    stack: Stack | None
    scale: Tensor
    bias: Tensor | None


class WeightBranch:
    """What the branches of linear, conv and embedding modules share.

    Makes `Operands` when an input first shows its device and type, and keeps the last ones.

    The strengths live in `scale`, `bias` and the segments, so that `restrength` exchanges those alone.
    """

    def __init__(
        self, weight: EffectiveWeight | None, bias: EffectiveWeight | None, compute: Compute
    ) -> None:
        self.compute = compute
        self._operands: Operands | None = None
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self._take(weight, bias)

    def _take(self, weight: EffectiveWeight | None, bias: EffectiveWeight | None) -> None:
        self.segments: Sequence[Segment] = weight.segments if weight is not None else ()
        self.layout = StackLayout.of(self.segments)
        self.bias = None if bias is None else DeltaVector(bias)

    def structure(self) -> tuple[object, ...]:
        """Equal for two branches that differ in strengths only."""
        return (
            type(self),
            self.compute,
            self.bias is None,
            self.layout.structure(),
            tuple(
                (segment.start, segment.stop, tuple(term.first for term in segment.terms), _shape(segment))
                for segment in self.segments
            ),
        )

    def restrength(self, other: WeightBranch) -> None:
        """Take the strengths of a branch of equal structure; the factors stay where they are."""
        self.segments, self.layout, self.bias = other.segments, other.layout, other.bias
        if self._operands is not None and self._made_for is not None:
            self._operands = self._with_strengths(
                self._operands.product, self._operands.stack, self._made_for[0]
            )

    def operands(self, x: Tensor) -> Operands:
        """The operands for this input: made at the first forward, then found."""
        made_for = (x.device, x.dtype)
        if self._operands is None or self._made_for != made_for:
            product = choose_product(self.compute, x.device, x.dtype)
            self._operands = None
            stack = build_stack(self.layout, self.segments, product.half, x.device)
            self._operands = self._with_strengths(product, stack, x.device)
            self._made_for = made_for
        return self._operands

    def release(self) -> None:
        """Let go of everything that was made for a device."""
        self._operands = self._made_for = None
        if self.bias is not None:
            self.bias.release()

    def _with_strengths(self, product: Product, stack: Stack | None, device: torch.device) -> Operands:
        scale = self.layout.scales().to(device)
        return Operands(
            product,
            tuple(self.segments),
            stack,
            scale if stack is None else scale * stack.exponents,
            None if self.bias is None else self.bias.on(device),
        )


def _shape(segment: Segment) -> tuple[object, ...]:
    """What a change of strength leaves alone in a segment, its stack apart."""
    return segment.left != 0.0, tuple((id(dense.value), dense.first) for dense in segment.dense)
