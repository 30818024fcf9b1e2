"""GGUF weights: block bytes of a ggml type and a logical shape.

The types that image models are kept in are decoded by torch where they lie (`gguf_blocks`), all others by the
`gguf` package on the CPU. That is the PyPI package, or inside Forge the older copy that Forge bundles; it is
imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .blocks import BlockedWeight, block_count
from .dense import DenseWeight
from .gguf_blocks import BLOCK_LAYOUTS
from .weight import StorageError, StoredWeight, flat_bytes, plain

ELEMENT_TYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
VALUES_PER_CALL = 1 << 20  # bounds the temporary arrays of the package's dequantizers, several times as large

Decode = Callable[[Tensor], Tensor]
"""Blocks, uint8 [n, block_bytes], to their values: fp32 [n, block_size], memory of its own."""

Dequantize = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class GGUFWeight(BlockedWeight):
    """W0 = decode(blocks), in fp32. blocks: uint8 [n, block_bytes]."""

    blocks: Tensor
    decode: Decode

    @property
    def nbytes(self) -> int:
        return self.blocks.numel()

    def undecoded(self, first: int, last: int) -> Tensor:
        return self.blocks.narrow(0, first, last - first)

    def decode_blocks(self, first: int, last: int) -> Tensor:
        return self.decode(self.undecoded(first, last))


def gguf_weight(data: Tensor, qtype: object, shape: Sequence[int]) -> StoredWeight:
    """The weight over GGUF block bytes. data: uint8, any shape; qtype: name, number or enum; shape: logical.

    F32, F16, BF16 and the types of `BLOCK_LAYOUTS` are read by torch; every other type that the installed
    `gguf` decodes, by `gguf`.
    Raises StorageError for an unknown or undecodable type, a wrong number of bytes, and for want of `gguf`.
    """
    logical = tuple(int(size) for size in shape)
    if plain(data).dtype not in (torch.uint8, torch.int8):
        raise StorageError(
            f"GGUF bytes were expected as uint8, but the parameter of shape {list(logical)} holds "
            f"{plain(data).dtype}; do not cast GGUF parameters to another type."
        )
    name = type_name(qtype)
    element = ELEMENT_TYPES.get(name)
    if element is not None:
        return element_weight(flat_bytes(data), name, element, logical)
    block_size, block_bytes, decode = decoder(name)
    stored = flat_bytes(data)
    check_size(stored, name, logical, block_count(prod(logical), block_size) * block_bytes)
    return GGUFWeight(
        shape=logical,
        kind=f"gguf-{name}",
        block_size=block_size,
        blocks=stored.view(-1, block_bytes),
        decode=decode,
    )


def element_weight(stored: Tensor, name: str, element: torch.dtype, shape: tuple[int, ...]) -> DenseWeight:
    """uint8 [nbytes] seen as elements of one floating type."""
    check_size(stored, name, shape, prod(shape) * element.itemsize)
    return DenseWeight(shape=shape, kind=f"gguf-{name}", stored=stored.view(element).view(shape))


def check_size(stored: Tensor, name: str, shape: tuple[int, ...], needed: int) -> None:
    """Raises StorageError unless there are `needed` bytes."""
    if stored.numel() != needed:
        raise StorageError(
            f"A GGUF {name} weight of shape {list(shape)} needs {needed} bytes but holds {stored.numel()}; "
            "its file is damaged or its type or shape is wrong: download it again or correct them."
        )


def type_name(qtype: object) -> str:
    """The ggml name, such as "Q4_K", of a `GGMLQuantizationType`, its number, or that name itself."""
    named = getattr(qtype, "name", qtype)
    if isinstance(named, str):
        return named
    constants = gguf_module("gguf.constants")
    try:
        return str(constants.GGMLQuantizationType(named).name)
    except ValueError as error:
        raise StorageError(
            f"{qtype!r} is no ggml type that the installed gguf package knows; update it: "
            "pip install -U gguf."
        ) from error


def decoder(name: str) -> tuple[int, int, Decode]:
    """(block_size, block_bytes, decode) of a ggml type."""
    layout = BLOCK_LAYOUTS.get(name)
    if layout is not None:
        return layout.block_size, layout.block_bytes, layout.decode
    return package_decoder(name)


def package_decoder(name: str) -> tuple[int, int, Decode]:
    """The same by the `gguf` package, tried on one block of zeros."""
    constants, quants = gguf_module("gguf.constants"), gguf_module("gguf.quants")
    try:
        member = constants.GGMLQuantizationType[name]
        block_size, block_bytes = constants.GGML_QUANT_SIZES[member]
        dequantize = partial(quants.dequantize, qtype=member)
        dequantize(np.zeros((1, block_bytes), dtype=np.uint8))
    except (KeyError, NotImplementedError) as error:
        raise StorageError(
            f"The installed gguf package cannot decode the GGUF type {name}; update it (pip install -U gguf) "
            "or use a checkpoint of another type, such as Q8_0 or Q4_K."
        ) from error
    return block_size, block_bytes, partial(decoded_on_cpu, dequantize, block_size)


def decoded_on_cpu(dequantize: Dequantize, block_size: int, blocks: Tensor) -> Tensor:
    """Blocks uint8 [n, block_bytes] -> fp32 [n, block_size], by numpy, copied back to where the bytes lie.

    dequantize: uint8 [1, k·block_bytes] -> fp32 [1, k·block_size].
    """
    touched = blocks.cpu().numpy()
    values = np.empty((len(touched), block_size), dtype=np.float32)
    step = max(1, VALUES_PER_CALL // block_size)
    for at in range(0, len(touched), step):
        part = dequantize(touched[at : at + step].reshape(1, -1))
        values[at : at + step] = part.reshape(-1, block_size)
    return torch.from_numpy(values).to(blocks.device)


def gguf_module(name: str) -> Any:
    """A module of the `gguf` package, imported when first needed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise StorageError(
            "Reading a GGUF weight needs the Python package gguf, which is not installed; "
            "install it with: pip install gguf."
        ) from error
