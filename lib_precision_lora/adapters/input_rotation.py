"""Adapters that rotate the inputs of a layer, and may scale its outputs: `W' = diag(1 + v) · W · N`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.adapters.operators import Diagonal, Operator
from lib_precision_lora.adapters.steps import Left, Right, Running, Step

SMALLEST_SCALE = 2.0**-22
"""The smallest c by which a share may be divided; `c − 1` is exact in fp32."""


@dataclass(frozen=True, slots=True, eq=False)
class InputRotation:
    """operator: N on columns [in · kernel]; on_convolution: N on a convolution, where it is another one.

    columns: what N turns, None for any multiple of a shared block; block: the size of its blocks;
    change: v, [out] fp32, or None.
    """

    operator: Operator
    columns: int | None
    block: int
    kind: str
    change: Tensor | None = None
    on_convolution: Operator | None = None

    @property
    def rank(self) -> int:
        return self.block

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors() + (() if self.change is None else (self.change,))

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise AdapterError("a rotation of inputs on a vector")
        columns = math.prod(shape[1:])
        if self.columns is None and columns % self.block:
            raise AdapterError(
                f"the shared {self.kind} block of {self.block} does not divide the layer's {columns} inputs: "
                "the file was trained on another model"
            )
        if self.columns not in (None, columns):
            raise AdapterError(
                f"the {self.kind} blocks of {self.block} turn {self.columns} inputs, the layer has "
                f"{columns}: the file was trained on another model"
            )
        if self.change is not None and self.change.numel() != shape[0]:
            raise AdapterError(
                f"the {self.kind} scale has {self.change.numel()} values, the layer has {shape[0]} outputs: "
                "the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> InputRotation:
        return self if self.change is None else dataclasses.replace(self, change=self.change[order])

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        """`(1 − s) W + s · diag(1 + v) · W N`.

        With c = 1 + s·v and f = s · (1 + v) / c, by rows, that is `diag(c) · (W + diag(f) · W dN)`: a
        rotation whose factor differs by row, which it does not at s = 1. f is that of c as it is kept, in
        fp32, so that nothing of the rotation is lost where c is small.
        """
        rows = running.shape[0]
        convolution = len(running.shape) > 2
        operator = self.on_convolution if convolution and self.on_convolution is not None else self.operator
        if self.change is None:
            return (Right(0, rows, operator, strength),)
        if strength == 1.0:
            return Right(0, rows, operator), Left(0, rows, Diagonal(self.change))
        kept = (strength * self.change.double()).float()
        kept = torch.where((1.0 + kept.double()).abs() < SMALLEST_SCALE, SMALLEST_SCALE - 1.0, kept)
        share = strength * (1.0 + self.change.double()) / (1.0 + kept.double())
        return Right(0, rows, operator, 1.0, share.float()), Left(0, rows, Diagonal(kept))
