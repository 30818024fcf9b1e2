"""The header of a GGUF file: `magic, version, tensor count, metadata count, metadata, tensor infos`.

All numbers are little-endian. A string is `u64 length, bytes`; a tensor info is `name, u32 axes, u64 sizes
(columns first), u32 type, u64 offset` into the data, which starts at the next multiple of the alignment.
Source: the GGUF specification of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lib_precision_lora.memory.gguf_cursor import U32, U64, Cursor
from lib_precision_lora.memory.tensors import (
    MOST_TENSORS,
    Header,
    HeaderError,
    StoredTensor,
    check_places,
    shortened,
)

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_ALIGNMENT = 2**20
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
"""A tensor's type number → its name, elements per block, bytes per block. Those of newer types are asked of
the package gguf, which takes its time to import."""


def read_gguf_header(path: Path, file: BinaryIO, size: int) -> Header:
    """Raises `HeaderError`: an unknown version or type, a truncated or a damaged file."""
    cursor = Cursor(path, file, size)
    cursor.take(len(GGUF_MAGIC))
    version = cursor.number(U32)
    if version not in VERSIONS:
        raise HeaderError(
            f"{path}: its GGUF version is {version}, known are {VERSIONS[0]} and {VERSIONS[-1]}; use a "
            "newer or little-endian conversion of the model."
        )
    tensor_count, value_count = cursor.number(U64), cursor.number(U64)
    if max(tensor_count, value_count) > MOST_TENSORS:
        raise HeaderError(
            f"{path}: its header goes beyond {MOST_TENSORS} entries: it announces {tensor_count} tensors and "
            f"{value_count} values; the file is truncated or damaged."
        )
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        name = cursor.name()
        metadata[name] = cursor.value(cursor.number(U32))
    infos = [cursor.info() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT:
        found = shortened(str(alignment))
        raise HeaderError(f"{path}: its data has an alignment of {found}; the file is damaged.")
    data = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, sizes, kind, offset in infos:
        if name in tensors:
            raise HeaderError(
                f"{path}: the tensor {shortened(name)} stands there twice; the file is damaged."
            )
        tensors[name] = _tensor(path, metadata, name, sizes, kind, data + offset)
    check_places(path, tensors.values(), size)
    return Header(path, "GGUF", size, tensors, metadata)


def _type(path: Path, name: str, kind: int) -> tuple[str, int, int]:
    """Its name, elements per block, bytes per block. Raises `HeaderError`."""
    if kind in TYPES:
        return TYPES[kind]
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
    except (ImportError, ValueError, KeyError) as error:
        raise HeaderError(
            f"{path}: {shortened(name)} is of GGUF type {kind}, which is not known here, nor to the Python "
            "package gguf, if it is installed; install its newest version."
        ) from error
    return known.name, block, block_bytes


def _tensor(
    path: Path, metadata: Mapping[str, Any], name: str, sizes: tuple[int, ...], kind: int, offset: int
) -> StoredTensor:
    stored, block, block_bytes = _type(path, name, kind)
    columns = sizes[0] if sizes else 1
    if columns % block:
        raise HeaderError(
            f"{path}: {shortened(name)} has {columns} columns, which blocks of {block} ({stored}) do not "
            "divide; the file is damaged."
        )
    elements = math.prod(sizes)
    shape = tuple(reversed(sizes))
    original = metadata.get(ORIGINAL_SHAPE + name)
    if isinstance(original, list) and all(type(size) is int and size >= 0 for size in original):
        if math.prod(original) != elements:
            raise HeaderError(
                f"{path}: {shortened(name)} of shape {list(shape)} cannot have been {original}; the file is "
                "damaged."
            )
        shape = tuple(original)
    return StoredTensor(name, shape, stored, elements // block * block_bytes, offset)
