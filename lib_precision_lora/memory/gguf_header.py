"""The header of a GGUF file: `magic, version, tensor count, metadata count, metadata, tensor infos`.

All numbers are little-endian. A string is `u64 length, bytes`; a tensor info is `name, u32 axes, u64 sizes
(columns first), u32 type, u64 offset` into the data, which starts at the next multiple of the alignment.
Source: the GGUF specification of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor, check_places

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_ALIGNMENT = 2**20
MOST_AXES = 8
DEEPEST_ARRAY = 4
LARGEST_HEADER = 32 * 2**20
"""A damaged count would have us read on through the data; tokenizers take a few MiB."""

KEPT_ITEMS = 16
"""Longer arrays (a tokenizer's words) are passed over."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Metadata of converters that store a tensor under another shape, for block sizes to divide its rows."""

TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}
"""A tensor's type number → its name, elements per block, bytes per block."""

NUMBERS: Mapping[int, str] = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""A metadata value's type number → its form."""

STRING, ARRAY = 8, 9


def read_gguf_header(path: Path, file: BinaryIO, size: int) -> Header:
    """Raises `HeaderError`: an unknown version or type, a truncated or a damaged file."""
    cursor = Cursor(path, file, size)
    cursor.take(len(GGUF_MAGIC))
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise HeaderError(
            f"{path}: its GGUF version is {version}, known are {VERSIONS[0]} and {VERSIONS[-1]}; use a "
            "newer or little-endian conversion of the model."
        )
    tensor_count, value_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.number("<I"))
    infos = [cursor.info() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT:
        raise HeaderError(f"{path}: its data has an alignment of {alignment}; the file is damaged.")
    data = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, sizes, kind, offset in infos:
        if name in tensors:
            raise HeaderError(f"{path}: the tensor {name} stands there twice; the file is damaged.")
        tensors[name] = _tensor(path, metadata, name, sizes, kind, data + offset)
    check_places(path, tensors.values(), size)
    return Header(path, "GGUF", size, tensors, metadata)


class Cursor:
    """Reads a file from its start, and knows where it ends."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self.position = 0

    def take(self, count: int) -> bytes:
        self._require(count)
        self.position += count
        return self._file.read(count)

    def skip(self, count: int) -> None:
        self._require(count)
        self.position += count
        self._file.seek(self.position)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """One metadata value; None for a long array."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth == DEEPEST_ARRAY:
            raise HeaderError(
                f"{self._path}: its metadata has a value of the unknown type {kind}; the file is damaged or "
                "of a newer format."
            )
        item, count = self.number("<I"), self.number("<Q")
        if item in NUMBERS and count > KEPT_ITEMS:
            self.skip(count * struct.calcsize(NUMBERS[item]))
            return None
        kept = []
        for _ in range(count):
            value = self.value(item, depth + 1)
            if count <= KEPT_ITEMS:
                kept.append(value)
        return kept if count <= KEPT_ITEMS else None

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, sizes (columns first), type and offset."""
        name, axes = self.text(), self.number("<I")
        if axes > MOST_AXES:
            raise HeaderError(f"{self._path}: {name} has {axes} axes; the file is damaged.")
        sizes = tuple(self.number("<Q") for _ in range(axes))
        return name, sizes, self.number("<I"), self.number("<Q")

    def _require(self, count: int) -> None:
        if LARGEST_HEADER < self.position + count <= self._size:
            raise HeaderError(
                f"{self._path}: its header goes beyond {LARGEST_HEADER} bytes; the file is damaged, download "
                "it again."
            )
        if self.position + count > self._size:
            raise HeaderError(
                f"{self._path}: the file is truncated: its header goes beyond its {self._size} bytes; "
                "download it again."
            )


def _tensor(
    path: Path, metadata: Mapping[str, Any], name: str, sizes: tuple[int, ...], kind: int, offset: int
) -> StoredTensor:
    if kind not in TYPES:
        raise HeaderError(f"{path}: {name} is of GGUF type {kind}, which is not known here.")
    stored, block, block_bytes = TYPES[kind]
    columns = sizes[0] if sizes else 1
    if columns % block:
        raise HeaderError(
            f"{path}: {name} has {columns} columns, which blocks of {block} ({stored}) do not divide; the "
            "file is damaged."
        )
    elements = math.prod(sizes)
    shape = tuple(reversed(sizes))
    original = metadata.get(ORIGINAL_SHAPE + name)
    if isinstance(original, list) and all(type(number) is int for number in original):
        if math.prod(original) != elements:
            raise HeaderError(
                f"{path}: {name} of shape {list(shape)} cannot have been {original}; the file is damaged."
            )
        shape = tuple(original)
    return StoredTensor(name, shape, stored, elements // block * block_bytes, offset)
