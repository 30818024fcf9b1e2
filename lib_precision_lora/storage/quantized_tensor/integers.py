"""Integers of 8 or 4 bits with one scale for the tensor or one per row, plain or rotated (ConvRot).

    int8            W0 = codes · scale
    int8-convrot    W0 = (codes · H) · scale        H acts on each `group` neighbouring columns
    int4-convrot    the same, two codes to a byte

The rotation adds and subtracts integers, which is exact in fp32; then each value is rounded once, by its
scale. Sources: ConvRot, arXiv:2512.03673; comfy-kitchen 0.2, `TensorWiseINT8Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from ..weight import StorageError, StoredWeight

LARGEST_GROUP = 2**16
"""Up to here sums of `group` codes are exact in fp32."""


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeight(StoredWeight):
    """codes: int8 [out, ...]; scale: [1, ...] or [out, 1, ...], `shape`'s ndim."""

    codes: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.codes, self.scale))

    def decode_rows(self, start: int, stop: int) -> Tensor:
        scale = self.scale.expand(self.shape[0], *self.scale.shape[1:])[start:stop]
        values = self.integers(start, stop)
        return values.mul_(scale.to(values))

    def integers(self, start: int, stop: int) -> Tensor:
        """What the scale multiplies, exact: fp32, memory of its own."""
        return self.codes[start:stop].to(torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RotatedWeight(IntegerWeight):
    """group: a power of 4 that divides the columns."""

    group: int

    def integers(self, start: int, stop: int) -> Tensor:
        return rotated(self.codes[start:stop].to(torch.float32), self.group)


@dataclass(frozen=True, slots=True, eq=False)
class RotatedNibbles(RotatedWeight):
    """codes: int8 or uint8 [out, in / 2]: two signed codes of 4 bits, the earlier in the low half."""

    def integers(self, start: int, stop: int) -> Tensor:
        packed = self.codes[start:stop].view(torch.uint8)
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        values = nibbles.to(torch.float32)
        return rotated(values.sub_((nibbles >> 3) * 16), self.group)


def rotated(values: Tensor, group: int) -> Tensor:
    """`values · H` on every `group` neighbouring columns; values: floating [rows, columns]. Its own inverse.

        H = (H₄ ⊗ … ⊗ H₄) / √group        H₄ = 1 − 2 J, J the identity with its rows in reverse

    One factor H₄ at a time, y_d = Σ x − 2 x_{3 − d} over a digit of the column's number to base 4. √group is
    a power of two.
    """
    turned, stride = values.contiguous(), 1  # a group of 1 stays as it is
    while stride < group:
        digits = turned.view(-1, 4, stride)
        turned = digits.sum(1, keepdim=True) - digits.flip(1).mul_(2)
        stride *= 4
    return turned.view(values.shape).div_(isqrt(group))


def check_group(kind: str, shape: tuple[int, ...], group: int) -> None:
    """Raise StorageError unless this is a rotation of the rows of a matrix of this shape."""
    power_of_4 = group > 1 and group & (group - 1) == 0 and group.bit_length() % 2 == 1
    if len(shape) != 2 or not power_of_4 or group > LARGEST_GROUP or shape[1] % group:
        raise StorageError(
            f"An {kind} weight of shape {list(shape)} says that groups of {group} columns are rotated, where "
            f"a group is a power of 4 up to {LARGEST_GROUP} that divides them; load the checkpoint again."
        )
