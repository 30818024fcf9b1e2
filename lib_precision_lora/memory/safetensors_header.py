"""The header of a safetensors file: `n: u64, n bytes of JSON, data`.

The JSON gives `{name: {dtype, shape, data_offsets}}`, offsets into the data, which they cover without holes.
Source: the format's description in the safetensors repository.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor, check_places

LARGEST_JSON = 100_000_000
"""The largest header that the safetensors library reads, in bytes."""

BITS: Mapping[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
}
"""Bits of one element, by the name of its type in a safetensors header."""


def read_safetensors_header(path: Path, file: BinaryIO, size: int) -> Header:
    """Raises `HeaderError`: empty, truncated, damaged, or of another type."""
    start = file.read(8)
    if size < 8:
        state = "empty" if size == 0 else f"truncated: it has {size} bytes"
        raise HeaderError(f"{path}: the file is {state}; download it again.")
    length = int.from_bytes(start, "little")
    if length > LARGEST_JSON and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise HeaderError(
            f"{path}: it is a pickled checkpoint, which cannot be read without running its code; "
            "use it as safetensors."
        )
    if length > LARGEST_JSON:
        raise HeaderError(
            f"{path}: it is neither a safetensors nor a GGUF file: its first bytes announce a header of "
            f"{length} bytes, above the limit of {LARGEST_JSON}."
        )
    if 8 + length > size:
        raise HeaderError(
            f"{path}: the file is truncated: it has {size} bytes, and its header alone {8 + length}; "
            "download it again."
        )
    entries = _parse(path, file.read(length))
    metadata = entries.pop("__metadata__", {})
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    check_places(path, tensors.values(), size)
    covered = 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    if covered != size:
        raise HeaderError(
            f"{path}: the file is damaged: it has {size} bytes, and its header accounts for {covered}; "
            "download it again."
        )
    return Header(path, "safetensors", size, tensors, metadata if isinstance(metadata, dict) else {})


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a key stands there twice")
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=unique)
        if isinstance(entries, dict):
            return entries
        reason = "it is no JSON object"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise HeaderError(
        f"{path}: it is no safetensors file, or a damaged one: its header cannot be read ({reason})."
    )


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        stored, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("a size is no natural number")
        bits = math.prod(shape) * BITS[stored]
    except (KeyError, TypeError, ValueError) as error:
        raise HeaderError(
            f"{path}: the header's entry for {name} cannot be read ({type(error).__name__}: {error}); the "
            "file is damaged or of a newer format."
        ) from error
    if begin > end or bits % 8 or bits // 8 != end - begin:
        raise HeaderError(
            f"{path}: {name} of shape {list(shape)} in {stored} takes {-(-bits // 8)} bytes, its place in "
            f"the file is {begin} to {end}; the file is damaged, download it again."
        )
    return StoredTensor(name, shape, stored, end - begin, data_start + begin)
