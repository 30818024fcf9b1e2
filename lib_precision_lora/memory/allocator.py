"""How much of a card the CUDA caching allocator takes for allocations of given sizes.

allocated: what `torch.cuda.memory_allocated` counts, each size rounded up to 512 bytes. reserved: what the
driver sees, since small allocations share segments and large ones are rounded further.
Source: the constants of torch's `c10/cuda/CUDACachingAllocator`.
"""

from __future__ import annotations

from collections.abc import Iterable

BLOCK = 512
"""Every allocation is a multiple of this."""

SMALL = 2**20
"""Up to here, allocations come out of shared segments of SMALL_SEGMENT."""

SMALL_SEGMENT = 2 * 2**20
MIDDLE = 10 * 2**20
"""Between SMALL and here, allocations come out of shared segments of MIDDLE_SEGMENT."""

MIDDLE_SEGMENT = 20 * 2**20
LARGE_MULTIPLE = 2 * 2**20
"""From MIDDLE on, an allocation has a segment of its own, a multiple of this."""


def allocated_bytes(sizes: Iterable[int]) -> int:
    """`Σ ⌈size / 512⌉ · 512`; sizes: bytes, empty tensors take nothing."""
    return sum(_up(size, BLOCK) for size in sizes)


def reserved_bytes(sizes: Iterable[int]) -> int:
    """The segments that a fresh allocator asks the driver for, to hold all of these at once; bytes."""
    small, middle, large = 0, 0, 0
    for size in sizes:
        if size <= SMALL:
            small += _up(size, BLOCK)
        elif size < MIDDLE:
            middle += _up(size, BLOCK)
        else:
            large += _up(size, LARGE_MULTIPLE)
    return _up(small, SMALL_SEGMENT) + _up(middle, MIDDLE_SEGMENT) + large


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
