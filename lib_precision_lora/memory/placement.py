"""Which layers' factors stay on the card, where not all of them can."""

from __future__ import annotations

import heapq
from collections.abc import Mapping


def choose_resident(sizes: Mapping[str, int], room: int) -> frozenset[str]:
    """Names whose sizes add up to at most `room` bytes: the largest that fits, again and again.

    Every layer runs once per step, so that any choice of the same sum saves the same copies.
    """
    chosen, left = [], room
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] <= left:
            chosen.append(name)
            left -= sizes[name]
    return frozenset(chosen)


def streaming_bytes(sizes: Mapping[str, int]) -> int:
    """What streamed layers take at once: the one at work, and the next one on its way."""
    return sum(heapq.nlargest(2, sizes.values()))
