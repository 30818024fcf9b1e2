"""What every stored weight offers: a logical shape, and values by row block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class StorageError(ValueError):
    """A parameter whose values cannot be read; the message says why and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight(ABC):
    """W0: the fp32 decode of a parameter's stored bytes, read by rows.

    shape: the logical shape [out, ...], whatever layout the bytes have.
    kind:  the format, e.g. "dense-bf16", "fp8-e4m3fn-scaled", "bnb-nf4", "gguf-Q4_K".

    It refers to the tensors that the parameter holds now: no copy is made, nothing is written, and results
    never share memory with them. When the host moves, bakes or quantizes the parameter, ask for a new one.
    """

    shape: tuple[int, ...]
    kind: str

    def __post_init__(self) -> None:
        if not self.shape:
            raise StorageError(
                f"A {self.kind} scalar has no rows to read; leave parameters without dimensions unpatched."
            )

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Stored bytes, with block statistics and scales, without constant code tables."""

    @abstractmethod
    def decode_rows(self, start: int, stop: int) -> Tensor:
        """W0[start:stop] in fp32 for a range already checked; memory of its own."""

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """W0[start:stop], decoded in fp32, then cast: [stop - start, *shape[1:]] on the stored device.

        Decodes only the blocks that these rows touch. An empty range gives an empty tensor.
        Raises StorageError unless 0 <= start <= stop <= shape[0].
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise StorageError(
                f"Rows {start}:{stop} do not lie within the {self.shape[0]} rows of a {self.kind} weight of "
                f"shape {list(self.shape)}; ask for 0 <= start <= stop <= {self.shape[0]}."
            )
        return self.decode_rows(start, stop).to(dtype)

    def sample(self, row: int) -> Tensor:
        """Numbers that a row is made of, as many for every row, to tell stored weights apart by: its values,
        or what is stored of them, and then in the memory of the weight."""
        return self.rows(row, row + 1)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W0 whole, shape `shape`. For tests, reports and small weights; elsewhere read by row block."""
        return self.rows(0, self.shape[0], dtype)


def plain(tensor: Tensor) -> Tensor:
    """The same memory as an ordinary tensor: without the subclass, its overrides, and autograd."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.detach(tensor).as_subclass(torch.Tensor)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 [nbytes]; raises StorageError where that would need a copy."""
    stored = plain(tensor)
    if not stored.is_contiguous():
        raise StorageError(
            f"Packed bytes of shape {list(stored.shape)} and strides {list(stored.stride())} are not "
            "contiguous; pass the parameter itself, not a transposed or sliced view of it."
        )
    return stored.view(-1).view(torch.uint8)
