"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
