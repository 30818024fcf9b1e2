"""One pass over a file: what belongs to tensors goes to its place, and every byte is hashed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from lib_precision_lora.containers.bounds import CHUNK_BYTES
from lib_precision_lora.containers.content import ContainerError
from lib_precision_lora.containers.hashing import Hashing
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
    """SHA-256 in hexadecimal digits: of the whole file, and from the first byte of the weights on (empty
    where nobody asks)."""

    whole: str
    weights: str


def fill(
    file: BinaryIO, size: int, rooms: Sequence[Room], tick: Tick, weights_start: int | None = None
) -> Digests:
    """Read a file of this many bytes once, from its first to its last.

    rooms: in any order, none over another, each within the file; tick: told before each chunk, in bytes;
    weights_start: where the bytes of the second digest begin, None without one.
    Raises `ContainerError` where the file has become shorter.
    """
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
            whole.feed(target[:count])
            if weights is not None and here + count > start:
                weights.feed(target[max(0, start - here) : count])
            here += count
            target = target[count:]

    def pass_by(end: int) -> None:
        while here < end:
            read(memoryview(bytearray(min(CHUNK_BYTES, end - here))))

    file.seek(0)
    start = 0 if weights_start is None else weights_start
    with ExitStack() as threads:
        whole = threads.enter_context(Hashing())
        weights = None if weights_start is None else threads.enter_context(Hashing())
        for room in sorted((room for room in rooms if room.tensor.nbytes), key=lambda room: room.offset):
            pass_by(room.offset)
            read(bytes_of(room.tensor))
        pass_by(size)
        return Digests(whole.digest(), "" if weights is None else weights.digest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
