"""Adapters that add one term to a weight: `W + strength · scale · term`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lib_precision_lora.adapters.adapter import Adapter, AdapterError
from lib_precision_lora.adapters.steps import Add, Running, Step
from lib_precision_lora.adapters.terms import Term


class Additive(Adapter, Protocol):
    """LoRA, LoHa, LoKr: what a DoRA can decompose."""

    @property
    def term(self) -> Term: ...

    @property
    def scale(self) -> float: ...


def add_term(adapter: Additive, running: Running, strength: float) -> tuple[Step, ...]:
    """`W + strength · scale · term`."""
    return (Add(0, running.shape[0], adapter.term, strength * adapter.scale),)


def require_shape(rows: int, columns: int, shape: tuple[int, ...]) -> None:
    """Raise `AdapterError` unless a term of [rows, columns] fits a weight of this shape."""
    if len(shape) < 2 or (rows, columns) != (shape[0], math.prod(shape[1:])):
        raise AdapterError(
            f"the factors make a {rows}×{columns} matrix, the layer's weight is "
            f"{'×'.join(map(str, shape))}: the file was trained on another model"
        )


def read_alpha(name: str, tensors: Mapping[str, Tensor]) -> float | None:
    """The number in a layer's `alpha`, None where it has none. Raises `AdapterError` for anything else."""
    alpha = tensors.get("alpha")
    if alpha is None:
        return None
    number = read_number(name, "alpha", alpha)
    if not math.isfinite(number):
        raise AdapterError(f"{name}: alpha is {number}; the file is damaged")
    return number


def read_number(name: str, role: str, tensor: Tensor) -> float:
    """The one real number in a tensor. Raises `AdapterError` for several, none, or a complex one."""
    if tensor.numel() != 1 or tensor.is_complex():
        values = f"{tensor.numel()} values" + (f" of {tensor.dtype}" if tensor.is_complex() else "")
        raise AdapterError(f"{name}: {role} has {values}, it must be one number; the file is damaged")
    return float(tensor)


def require_matrices(name: str, **parts: Tensor) -> None:
    """Raise `AdapterError` for a factor that is no matrix (or kernel), or that is empty."""
    for role, part in parts.items():
        if part.ndim < 2:
            raise AdapterError(f"{name}: {role} has shape {list(part.shape)}, it must be a matrix")
        if part.numel() == 0:
            raise AdapterError(f"{name}: {role} has shape {list(part.shape)}: the rank is zero")


def require_parts(name: str, tensors: Mapping[str, Tensor], *roles: str) -> None:
    """Raise `AdapterError` naming the first of these tensors that a layer lacks."""
    for role in roles:
        if role not in tensors:
            raise AdapterError(f"{name}: {role} is missing, the file is incomplete")
