"""Dense adapters: `diff` adds a whole tensor, `set` puts one in the place of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.operators import Uniform
from lib_precision_lora.adapters.steps import Add, Left, Running, Step
from lib_precision_lora.adapters.terms import Dense


@dataclass(frozen=True, slots=True, eq=False)
class Diff:
    """`W + strength · value`; value has the shape of the weight (or bias, or norm)."""

    value: Tensor
    kind: str = "diff"

    @property
    def rank(self) -> None:
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def check(self, shape: tuple[int, ...]) -> None:
        _same_shape(self.value, shape)

    def reordered(self, order: Tensor) -> Diff:
        return Diff(self.value[order])

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return (Add(0, running.shape[0], Dense(self.value), strength),)


@dataclass(frozen=True, slots=True, eq=False)
class Assign:
    """`value`, whatever the weight was and whatever the strength is (as the host's `set`)."""

    value: Tensor
    kind: str = "set"

    @property
    def rank(self) -> None:
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.value,)

    def check(self, shape: tuple[int, ...]) -> None:
        _same_shape(self.value, shape)

    def reordered(self, order: Tensor) -> Assign:
        return Assign(self.value[order])

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        rows = running.shape[0]
        return Left(0, rows, Uniform(-1.0)), Add(0, rows, Dense(self.value), 1.0)


def read_dense(name: str, tensors: Mapping[str, Tensor]) -> Diff | Assign | None:
    """The dense patch of a layer's weight among its tensors, by role; None where there is none."""
    if "set_weight" in tensors:
        return make_assign(name, tensors["set_weight"])
    return make_diff(name, tensors["diff"]) if "diff" in tensors else None


def read_bias(name: str, tensors: Mapping[str, Tensor]) -> Diff | None:
    """The patch of a layer's bias among its tensors, by role; None where there is none."""
    return make_diff(name, tensors["diff_b"]) if "diff_b" in tensors else None


def make_diff(name: str, value: Tensor) -> Diff:
    """A `Diff` from a file's tensor. Raises `AdapterError`: NaN or inf, no float type."""
    value = as_float_factor(name, "diff", value)
    require_finite(name, diff=value)
    return Diff(value)


def make_assign(name: str, value: Tensor) -> Assign:
    """An `Assign` from a file's tensor. Raises `AdapterError`: NaN or inf, no float type."""
    value = as_float_factor(name, "set_weight", value)
    require_finite(name, set_weight=value)
    return Assign(value)


def _same_shape(value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise AdapterError(
            f"the file's tensor is {'×'.join(map(str, value.shape))}, the layer's is "
            f"{'×'.join(map(str, shape))}: the file was trained on another model"
        )
