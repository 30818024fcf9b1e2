"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def part_of(seconds: float, whole: float) -> str:
    """A duration, and how much of the whole it is."""
    return f"{duration(seconds)} ({100 * seconds / whole:.1f} %)"


def mebibytes(nbytes: int) -> str:
    """MiB; a smaller unit for an amount that would be 0.0 of it."""
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if not nbytes or nbytes >= size / 20:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} bytes"
