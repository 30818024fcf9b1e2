"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def part_of(seconds: float, whole: float) -> str:
    """A duration, and how much of the whole it is."""
    return f"{duration(seconds)} ({100 * seconds / whole:.1f} %)"


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
