"""FP8 weights, and weights of any floating type that their module multiplies by `scale_weight`.

Forge's Linear multiplies by its `scale_weight` whatever type it loaded the weight in, so an FP8 checkpoint
that was widened to fp16 or bf16 on loading is still scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .dense import DENSE_KINDS, elements, floating_weight, single
from .weight import StorageError, StoredWeight, plain

FP8_KINDS = MappingProxyType(
    {
        torch.float8_e4m3fn: "fp8-e4m3fn",
        torch.float8_e5m2: "fp8-e5m2",
    }
)
SCALABLE_KINDS = MappingProxyType({**DENSE_KINDS, **FP8_KINDS})


@dataclass(frozen=True, slots=True, eq=False)
class ScaledWeight(StoredWeight):
    """W0 = stored · scale, in fp32. stored: `shape`; scale: [1, ...] or [out, 1, ...], `shape`'s ndim."""

    stored: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.stored, self.scale))

    def sample(self, row: int) -> Tensor:
        return elements(self.stored[row : row + 1]) * self._scale(row, row + 1)

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return single(self.stored[start:stop]).mul_(self._scale(start, stop))

    def _scale(self, start: int, stop: int) -> Tensor:
        """Of these rows, in fp32 where the elements lie."""
        scale = self.scale.expand(self.shape[0], *self.scale.shape[1:])[start:stop]
        return scale.to(self.stored.device, torch.float32)


def fp8_weight(parameter: Tensor, module: nn.Module | None) -> StoredWeight | None:
    """Recognises float8_e4m3fn and float8_e5m2, and any floating type whose module holds a `scale_weight`.

    The scale is that of the weight: a module's `bias` is never scaled.
    Raises StorageError when the scale has neither one element nor one per row.
    """
    scale = getattr(module, "scale_weight", None)
    if scale is None or parameter is getattr(module, "bias", None):
        kind = FP8_KINDS.get(parameter.dtype)
        return None if kind is None else floating_weight(parameter, kind)
    kind = SCALABLE_KINDS.get(parameter.dtype)
    return None if kind is None else scaled_weight(parameter, scale, f"{kind}-scaled")


def scaled_weight(parameter: Tensor, scale: Tensor, kind: str) -> ScaledWeight:
    """stored · scale for a scale of one element, [out], or [out, 1, ...]."""
    stored = plain(parameter)
    shape = tuple(stored.size())
    return ScaledWeight(shape=shape, kind=kind, stored=stored, scale=scale_column(scale, shape, kind))


def scale_column(scale: Tensor, shape: tuple[int, ...], kind: str, name: str = "scale_weight") -> Tensor:
    """A scale as `[1, ...]` or `[out, 1, ...]`, the same memory. name: the host's, for the message.

    Raises StorageError when it has neither one element nor one per row.
    """
    factor = plain(scale)
    per_row = factor.size()[:1] == shape[:1] and factor.numel() == shape[0]
    if factor.numel() != 1 and not per_row:
        raise StorageError(
            f"A {name} of shape {list(factor.size())} fits no {kind} weight of shape {list(shape)}: "
            "it needs one element or one per row; load a checkpoint scaled per tensor or per row."
        )
    return factor.reshape(-1, *(1 for _ in shape[1:]))
