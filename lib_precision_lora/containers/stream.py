"""One pass over a file: what belongs to tensors goes to its place, and every byte is hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from lib_precision_lora.containers.bounds import CHUNK_BYTES
from lib_precision_lora.containers.content import ContainerError
from lib_precision_lora.ticks import Tick


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Where the bytes of a file from `offset` on go: into the memory of this tensor."""

    offset: int
    tensor: Tensor

    @property
    def end(self) -> int:
        return self.offset + self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 in hexadecimal digits: of the whole file, and from the first byte of the weights on."""

    whole: str
    weights: str


def fill(file: BinaryIO, size: int, rooms: Sequence[Room], weights_start: int, tick: Tick) -> Digests:
    """Read a file of this many bytes once, from its first to its last.

    rooms: in any order, none over another, each within the file; tick: told before each chunk, in bytes.
    Raises `ContainerError` where the file has become shorter.
    """
    whole, weights = hashlib.sha256(), hashlib.sha256()
    beside = bytearray(min(CHUNK_BYTES, _widest_gap(rooms, size)))
    here = 0

    def read(target: memoryview) -> None:
        nonlocal here
        while target:
            tick(here, size)
            count = file.readinto(target[:CHUNK_BYTES])  # type: ignore[attr-defined]
            if not count:
                raise ContainerError(
                    f"the file is truncated: it had {size} bytes and ends at {here}; download or copy it "
                    "again"
                )
            read_now = target[:count]
            whole.update(read_now)
            if here + count > weights_start:
                weights.update(read_now[max(0, weights_start - here) :])
            here += count
            target = target[count:]

    def pass_by(end: int) -> None:
        while here < end:
            read(memoryview(beside)[: end - here])

    file.seek(0)
    for room in sorted((room for room in rooms if room.tensor.nbytes), key=lambda room: room.offset):
        pass_by(room.offset)
        read(bytes_of(room.tensor))
    pass_by(size)
    return Digests(whole.hexdigest(), weights.hexdigest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _widest_gap(rooms: Sequence[Room], size: int) -> int:
    edges = sorted((room.offset, room.end) for room in rooms)
    starts = [0, *(end for _, end in edges)]
    return max(
        stop - start for start, stop in zip(starts, [*(start for start, _ in edges), size], strict=True)
    )
