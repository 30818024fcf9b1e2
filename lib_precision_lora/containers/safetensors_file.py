"""A safetensors file: its header first, and then each tensor into memory of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from lib_precision_lora.containers.bounds import MOST_AXES, MOST_TENSORS
from lib_precision_lora.containers.content import SAID_DIGEST, ContainerError, LoraContent
from lib_precision_lora.containers.stream import Room, fill
from lib_precision_lora.memory.safetensors_header import read_safetensors_header
from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor
from lib_precision_lora.ticks import Tick

_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "C64": "complex64",
}

DO = "download or copy it again"

DTYPES: Mapping[str, torch.dtype] = {
    stored: getattr(torch, name) for stored, name in _NAMES.items() if hasattr(torch, name)
}
"""The name of a type in a safetensors header → that of this torch, where it has one of whole bytes."""


def read_safetensors(name: str, file: BinaryIO, size: int, tick: Tick) -> LoraContent:
    """name: for messages. Raises `ContainerError`; of a damaged header, before anything behind it is read."""
    header = _header(name, file, size)
    rooms: list[Room] = []
    tensors = {}
    for key, stored in header.tensors.items():
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.stored])
        tensors[key] = tensor
        rooms.append(Room(stored.offset, tensor))
    metadata = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
    start = size - sum(stored.nbytes for stored in header.tensors.values())
    digests = fill(file, size, rooms, tick, start if SAID_DIGEST in metadata else None)
    return LoraContent(tensors, metadata, digests.whole, digests.weights)


def _header(name: str, file: BinaryIO, size: int) -> Header:
    try:
        header = read_safetensors_header(Path(name), file, size)
    except HeaderError as error:
        reason = str(error).removeprefix(f"{name}: ").rstrip(".")
        raise ContainerError(reason if "download" in reason else f"{reason}; {DO}") from error
    if len(header.tensors) > MOST_TENSORS:
        raise ContainerError(f"it announces {len(header.tensors)} tensors, above the limit of {MOST_TENSORS}")
    for stored in header.tensors.values():
        _check(stored)
    return header


def _check(stored: StoredTensor) -> None:
    if stored.stored not in DTYPES:
        raise ContainerError(
            f"{stored.name} is stored as {stored.stored}, which torch {torch.__version__} cannot read as a "
            "factor; save the LoRA as fp16, bf16 or fp32"
        )
    if len(stored.shape) > MOST_AXES or max(stored.shape, default=0) >= 2**62:
        raise ContainerError(f"{stored.name} has a shape that no layer has: {len(stored.shape)} axes")
