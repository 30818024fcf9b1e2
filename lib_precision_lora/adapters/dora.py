"""DoRA: an additive adapter whose direction and magnitude are kept apart.

    W' = (W + Δ) · diag(m / ‖W + Δ‖)      norm and magnitude by output row or by input channel

W is the running weight, so the norm is the one of what the adapter really meets. Source: DoRA
(arXiv 2402.09353); LyCORIS `weight_decompose` (`wd_on_out` both ways), PEFT `use_dora`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import Additive, add_term
from lib_precision_lora.adapters.operators import Diagonal
from lib_precision_lora.adapters.steps import Add, Left, Right, Running, Step


@dataclass(frozen=True, slots=True, eq=False)
class DoRA:
    """inner: what gives Δ at strength 1; magnitude: [out] or [in] fp32; axis: which of the two.

    base_norm: take ‖W‖ instead of ‖W + Δ‖ on the output axis, as stock Forge does.
    """

    inner: Additive
    magnitude: Tensor
    axis: Literal["out", "in"]
    base_norm: bool = False

    @property
    def kind(self) -> str:
        return "dora" if self.inner.kind == "lora" else f"{self.inner.kind} with dora"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.inner.tensors(), self.magnitude

    def check(self, shape: tuple[int, ...]) -> None:
        self.inner.check(shape)
        expected = shape[0] if self.axis == "out" else shape[1]
        if self.magnitude.numel() != expected:
            raise AdapterError(
                f"dora_scale has {self.magnitude.numel()} values, the layer has {expected} "
                f"{'outputs' if self.axis == 'out' else 'inputs'}: the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> DoRA:
        magnitude = self.magnitude[order] if self.axis == "out" else self.magnitude
        inner: Additive = self.inner.reordered(order)  # type: ignore[assignment]
        return dataclasses.replace(self, inner=inner, magnitude=magnitude)

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        (addition,) = add_term(self.inner, running, 1.0)
        assert isinstance(addition, Add)
        rows = running.shape[0]
        change = running.remember(self, lambda: self._change(running, addition))
        scaled = dataclasses.replace(addition, scale=strength * addition.scale)
        if self.axis == "out":
            return Left(0, rows, Diagonal(change), strength), dataclasses.replace(scaled, row_change=change)
        turn = Diagonal(change)
        return Right(0, rows, turn, strength), dataclasses.replace(scaled, columns=((turn, 1.0),))

    def _change(self, running: Running, addition: Add) -> Tensor:
        """`m / norm − 1` in fp32: [out], or [in · kernel]; −1 where the norm is 0, a direction undefined."""
        if self.axis == "out":
            squares = running.row_squares(() if self.base_norm else (addition,))
        else:
            kernel = math.prod(running.shape[2:])
            squares = running.column_squares((addition,)).view(-1, kernel).sum(1)
        norm = squares.sqrt()
        ratio = torch.where(norm > 0, self.magnitude.to(norm) / norm, torch.zeros_like(norm))
        change = (ratio - 1.0).float()
        return change if self.axis == "out" else change.repeat_interleave(math.prod(running.shape[2:]))


def decompose(name: str, inner: Additive, tensors: Mapping[str, Tensor], rows: int) -> Additive | DoRA:
    """The adapter with the magnitude among its layer's tensors, by role; itself where there is none.

    dora_scale: [out, 1, …], or [1, in, 1, …] for the input axis; magnitude (PEFT): [out] in any shape.
    rows: out. Raises `AdapterError`: NaN, inf, a shape that is neither.
    """
    magnitude, scale = tensors.get("magnitude"), tensors.get("dora_scale")
    if magnitude is not None:
        require_finite(name, magnitude=magnitude)
        return DoRA(inner, as_float_factor(name, "magnitude", magnitude).flatten().float(), "out")
    if scale is None:
        return inner
    require_finite(name, dora_scale=scale)
    axis: Literal["out", "in"] = "out" if scale.ndim < 2 or scale.shape[0] == rows else "in"
    if axis == "in" and scale.shape[0] != 1:
        raise AdapterError(
            f"{name}: dora_scale has shape {list(scale.shape)}, the layer has {rows} outputs: "
            "the file was trained on another model"
        )
    return DoRA(inner, as_float_factor(name, "dora_scale", scale).flatten().float(), axis)
