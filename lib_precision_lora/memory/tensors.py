"""A stored tensor as a file's header describes it, and the header as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_TENSORS = 2**15
"""In one file. The largest that are known have some thousands; every name costs time and memory."""

LONGEST_NAME = 512
"""Bytes of a tensor's name. The longest that trainers write have less than 200."""

MOST_AXES = 8


class HeaderError(ValueError):
    """A file whose header cannot be used; one sentence that names the file."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """shape: the logical one, rows first; stored: the type's name in the file (BF16, U8, Q4_K, …); nbytes:
    in the file; offset: of its first byte, from the start of the file."""

    name: str
    shape: tuple[int, ...]
    stored: str
    nbytes: int
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """layout: "safetensors" or "GGUF"; tensors by name, in the file's order; nbytes: of the whole file."""

    path: Path
    layout: str
    nbytes: int
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def shortened(name: str) -> str:
    """For a message."""
    return name if len(name) <= 80 else f"{name[:80]}…"


def check_places(path: Path, tensors: Iterable[StoredTensor], end: int) -> None:
    """Raise `HeaderError` where a tensor lies beyond the end of the file, or in the place of another."""
    here, former = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.nbytes and tensor.offset < here:
            raise HeaderError(
                f"{path}: the tensors {former} and {tensor.name} overlap; the file is damaged, "
                "download it again."
            )
        if tensor.offset + tensor.nbytes > end:
            raise HeaderError(
                f"{path}: the file is truncated: it has {end} bytes, and {tensor.name} ends at "
                f"{tensor.offset + tensor.nbytes}; download it again."
            )
        here, former = max(here, tensor.offset + tensor.nbytes), tensor.name
