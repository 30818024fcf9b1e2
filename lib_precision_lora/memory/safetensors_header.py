"""The header of a safetensors file: `n: u64, n bytes of JSON, data`.

The JSON gives `{name: {dtype, shape, data_offsets}}`, offsets into the data, which they cover without holes.
Source: the format's description in the safetensors repository.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from lib_precision_lora.memory.header_json import Entry, HeaderTextError, parse_header
from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor, check_places, shortened

LARGEST_JSON = 2**24
"""The largest header that is read, in bytes. Those of the largest models have some 2 MB; the library takes
100 MB, which no file of a model needs."""

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
    if length > LARGEST_JSON:
        raise HeaderError(f"{path}: {_other_kind(start, length)}")
    if 8 + length > size:
        raise HeaderError(
            f"{path}: the file is truncated: it has {size} bytes, and its header alone {8 + length}; "
            "download it again."
        )
    try:
        entries, metadata = parse_header(file.read(length))
    except HeaderTextError as error:
        raise HeaderError(
            f"{path}: it is no safetensors file, or a damaged one: its header cannot be read ({error})."
        ) from error
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    check_places(path, tensors.values(), size)
    covered = 8 + length + sum(tensor.nbytes for tensor in tensors.values())
    if covered != size:
        raise HeaderError(
            f"{path}: the file is damaged: it has {size} bytes, and its header accounts for {covered}; "
            "download it again."
        )
    return Header(path, "safetensors", size, tensors, metadata)


def _other_kind(start: bytes, length: int) -> str:
    """What a file is whose first bytes are no length of a header."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "it is a pickled checkpoint, which cannot be read without running its code; "
            "use it as safetensors."
        )
    return (
        "it is neither a safetensors nor a GGUF file: its first bytes announce a header of "
        f"{length} bytes, above the limit of {LARGEST_JSON}."
    )


def _tensor(path: Path, name: str, entry: Entry, data_start: int) -> StoredTensor:
    shape, stored, size = entry.shape, entry.dtype, entry.end - entry.begin
    if stored not in BITS:
        raise HeaderError(
            f"{path}: {shortened(name)} is of the type {stored}, which is not known here; the file is "
            "damaged or of a newer format."
        )
    bits = math.prod(shape) * BITS[stored]
    if size < 0 or bits % 8 or bits // 8 != size:
        raise HeaderError(
            f"{path}: {shortened(name)} of shape {list(shape)} in {stored} takes {-(-bits // 8)} bytes, its "
            f"place in the file is {entry.begin} to {entry.end}; the file is damaged, download it again."
        )
    return StoredTensor(name, shape, stored, size, data_start + entry.begin)
