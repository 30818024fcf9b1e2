"""A stored weight with input channels behind its own that count as zeros."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from .weight import StoredWeight


@dataclass(frozen=True, slots=True, eq=False)
class WidenedWeight(StoredWeight):
    """`[W0 | 0]`: [out, in + extra, *kernel] over the bytes of W0, [out, in, *kernel]."""

    own: StoredWeight

    @property
    def nbytes(self) -> int:
        return self.own.nbytes

    @property
    def own_channels(self) -> int:
        """`in`, the channels that are stored."""
        return self.own.shape[1]

    def decode_rows(self, start: int, stop: int) -> Tensor:
        rows = self.own.decode_rows(start, stop)
        kernel_axes = (0, 0) * (len(self.shape) - 2)
        return pad(rows, (*kernel_axes, 0, self.shape[1] - self.own_channels))


def widened(stored: StoredWeight, channels: int) -> StoredWeight:
    """The weight with at least this many input channels; itself where it has them. stored: [out, in, …]."""
    if stored.shape[1] >= channels:
        return stored
    own = stored.own if isinstance(stored, WidenedWeight) else stored
    return WidenedWeight((own.shape[0], channels, *own.shape[2:]), own.kind, own)
