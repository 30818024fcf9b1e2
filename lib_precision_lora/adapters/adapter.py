"""What every adapter can do, and the error that says why one cannot be used."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Running, Step

_POWERS_OF_TWO = tuple(getattr(torch, name) for name in ("float8_e8m0fnu",) if hasattr(torch, name))
"""Types of one byte whose values fp16 does not hold; older torch has none."""


class AdapterError(ValueError):
    """An adapter that cannot be applied: one sentence with the layer and the numbers."""


class Adapter(Protocol):
    """One LoRA-family patch for one parameter, as read from a file; immutable."""

    @property
    def kind(self) -> str: ...

    @property
    def rank(self) -> int | None: ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that the adapter holds."""
        ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `AdapterError` unless the adapter fits a weight (or row range) of this shape."""
        ...

    def reordered(self, order: Tensor) -> Adapter:
        """The adapter of the weight whose rows are `W[order]`; order: [out], a permutation."""
        ...

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        """The steps to `W + strength · (A(W) − W)`; their rows count from the first row of `running`."""
        ...


def adapter_bytes(adapter: Adapter) -> int:
    """Bytes of the factors as they are held."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors())


LARGEST = torch.finfo(torch.float32).max
"""The largest number that the arithmetic of a branch can hold, about 3.4e38."""


def require_finite(name: str, **tensors: Tensor | None) -> tuple[float, ...]:
    """The largest absolute element of each factor that is there, 0 of a complex one.

    Raises `AdapterError` if one holds NaN or inf: the sum would spread it over the whole image. A finite fp64
    value beyond fp32 is inf to all that is computed with it.
    """
    sizes: list[float] = []
    for role, tensor in tensors.items():
        if tensor is None:
            continue
        sizes.append(0.0 if tensor.is_complex() else largest_size(tensor))
        if sizes[-1] <= LARGEST and not tensor.is_complex():  # NaN is not
            continue
        finite = torch.isfinite(tensor.float() if tensor.dtype == torch.float64 else tensor)
        if not finite.all():
            count = int((~finite).sum())
            what = "NaN or inf values" if not torch.isfinite(tensor).all() else f"values beyond {LARGEST:.3g}"
            raise AdapterError(
                f"{name}: {role} holds {count} {what} of {tensor.numel()}; "
                "the file is damaged or its training diverged, use another epoch of it"
            )
    return tuple(sizes)


def largest_size(tensor: Tensor) -> float:
    """`max |t|` of real numbers, in one pass that makes no other tensor; 0 of none, NaN where one is NaN."""
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in tensor.aminmax())
    return max(-low, high) if low == low else low


def require_number(what: str, number: float) -> None:
    """Raise `AdapterError` unless fp32 holds this number: NaN, inf, or finite and beyond it."""
    if not math.isfinite(number):
        raise AdapterError(f"{what} is {number}, it must be a finite number")
    if abs(number) > LARGEST:
        raise AdapterError(f"{what} is {number:.6g}, it must lie within ±{LARGEST:.3g}")


def widened(name: str, role: str, tensor: Tensor) -> Tensor:
    """The tensor in a type that can be asked for its values: FP8 in fp16, E8M0 (powers of two) in fp32.

    Both are exact; other types stay. Raises `AdapterError` for floats of less than a byte: torch keeps
    several of them in one element, and computes with none.
    """
    if not tensor.dtype.is_floating_point or tensor.element_size() > 1:
        return tensor
    try:
        return tensor.to(torch.float32 if tensor.dtype in _POWERS_OF_TWO else torch.float16)
    except (NotImplementedError, RuntimeError) as error:
        raise AdapterError(
            f"{name}: {role} is stored as {tensor.dtype}, which cannot be read; save the file in fp16 or bf16"
        ) from error


def as_float_factor(name: str, role: str, tensor: Tensor) -> Tensor:
    """The factor, which must be of a float type: integers are values of a quantization that no file names.

    Raises `AdapterError` for another.
    """
    if not tensor.dtype.is_floating_point:
        raise AdapterError(f"{name}: {role} is stored as {tensor.dtype}, a LoRA factor must be a float type")
    return tensor
