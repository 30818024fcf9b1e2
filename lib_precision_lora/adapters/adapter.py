"""What every adapter can do, and the error that says why one cannot be used."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Running, Step


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


def require_finite(name: str, **tensors: Tensor | None) -> None:
    """Raise `AdapterError` if a factor holds NaN or inf: the sum would spread it over the whole image."""
    for role, tensor in tensors.items():
        if tensor is not None and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise AdapterError(
                f"{name}: {role} holds {count} NaN or inf values of {tensor.numel()}; "
                "the file is damaged or its training diverged, use another epoch of it"
            )


def as_float_factor(name: str, role: str, tensor: Tensor) -> Tensor:
    """The factor in a type that products accept: FP8 widens (exactly) to fp16, other floats stay.

    Raises `AdapterError` for integers: quantized LoRA files are not a known layout.
    """
    if not tensor.dtype.is_floating_point:
        raise AdapterError(f"{name}: {role} is stored as {tensor.dtype}, a LoRA factor must be a float type")
    if tensor.element_size() == 1:
        return tensor.to(torch.float16)
    return tensor
