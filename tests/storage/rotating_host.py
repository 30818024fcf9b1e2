"""Stands for the module of a host that rotates its int8 weights."""

from __future__ import annotations

from tests.storage.one_buffer import Int8Parameter

GROUP = 4


def rot_group(columns: int) -> int:
    """How many neighbouring columns are rotated together; 0 for none."""
    return GROUP if columns % GROUP == 0 else 0


class RotatedInt8Parameter(Int8Parameter):
    """As another host's."""
