"""Weights stored in a floating point type of torch, one element per value."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .weight import StorageError, StoredWeight, plain

DENSE_KINDS = MappingProxyType(
    {
        torch.float64: "dense-fp64",
        torch.float32: "dense-fp32",
        torch.float16: "dense-fp16",
        torch.bfloat16: "dense-bf16",
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight(StoredWeight):
    """W0 = stored, cast to fp32. stored: any floating point type, `shape`, any strides."""

    stored: Tensor

    @property
    def nbytes(self) -> int:
        return self.stored.numel() * self.stored.element_size()

    def sample(self, row: int) -> Tensor:
        return elements(self.stored[row : row + 1])

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return single(self.stored[start:stop])


def elements(stored: Tensor) -> Tensor:
    """The elements as numbers that need no decoding: those of 8 bits as bytes."""
    return stored.view(torch.uint8) if stored.element_size() == 1 else stored


def single(stored: Tensor) -> Tensor:
    """The elements in fp32, memory of its own. Those of 8 bits by a table on a CPU: torch's own cast takes
    five times as long there."""
    if stored.element_size() > 1 or stored.device.type != "cpu":
        return stored.to(torch.float32, copy=True)
    table = torch.arange(256, dtype=torch.uint8).view(stored.dtype).to(torch.float32)
    return table.index_select(0, stored.view(torch.uint8).flatten().int()).view(stored.shape)


def floating_weight(parameter: Tensor, kind: str) -> DenseWeight:
    """The parameter's own elements under the name `kind`; raises StorageError unless they are floating."""
    stored = plain(parameter)
    if not stored.is_floating_point():
        raise StorageError(
            f"A {kind} weight was expected in floating point but holds {stored.dtype} of shape "
            f"{list(stored.shape)}; load the checkpoint in a supported format."
        )
    return DenseWeight(shape=tuple(stored.size()), kind=kind, stored=stored)


def dense_weight(parameter: Tensor, module: nn.Module | None) -> DenseWeight | None:
    """Recognises fp64, fp32, fp16 and bf16."""
    kind = DENSE_KINDS.get(parameter.dtype)
    return None if kind is None else floating_weight(parameter, kind)
