"""What a tensor takes on the card, in the types in which a host can hold a checkpoint.

    nf4, fp4   ⌈n / 2⌉ + 4 · ⌈n / 64⌉ + 64      linear weights: codes, one fp32 maximum per 64, 16 fp32 values
    fp8        n                                every tensor
    16 bits    2 n                              every other one, also what the file holds in fp32

A `QuantizedTensor` stays as in the file, and what is beside it is held in 16 bits; so is scaled FP8, unless
16 bits are chosen for it. A GGUF matrix stays as in the file, but Q4_K, whose eight scales and minima per
block the host unpacks to 16 bits each: 160 bytes per 256 instead of 144.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from lib_precision_lora.memory.quantized_layers import FP8_SCALED
from lib_precision_lora.memory.tensors import StoredTensor

Storage = Literal["as-is", "nf4", "fp4", "fp8", "fp16", "bf16"]
STORAGES: tuple[Storage, ...] = ("as-is", "nf4", "fp4", "fp8", "fp16", "bf16")
PACKED = ("NF4", "FP4")
QUANTIZED = ("NVFP4", "MXFP8", "INT8", "INT4")
PLAIN = ("F16", "BF16", "F32", "F64")
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
UNPACKED_Q4_K = (160, 144)


class StorageChoiceError(ValueError):
    """A checkpoint cannot be held in the chosen type; one sentence."""


def own_storage(tensors: Sequence[StoredTensor], layout: str) -> str:
    """How the host holds these tensors when nothing else is chosen: "GGUF", "NF4", "FP4", "NVFP4", "MXFP8",
    "INT8", "INT4", "FP8 scaled", "FP8" or "16 bits".

    As the host decides: any packed tensor counts for all, of several types the most frequent; else the type
    that most tensors have.
    """
    kinds = Counter(tensor.stored for tensor in tensors)
    if layout == "GGUF":
        return "GGUF"
    packed = [(count, kind) for kind, count in kinds.items() if kind in (*PACKED, *QUANTIZED, FP8_SCALED)]
    if packed:
        return max(packed)[1]
    return "FP8" if kinds and kinds.most_common(1)[0][0] in EIGHT_BITS else "16 bits"


def check_choice(own: str, storage: Storage) -> None:
    """Raise `StorageChoiceError` where the host cannot convert: packed weights stay in their own type."""
    fixed = own in ("GGUF", *PACKED, *QUANTIZED) or (own == FP8_SCALED and storage in ("nf4", "fp4"))
    if fixed and storage not in ("as-is", own.lower()):
        raise StorageChoiceError(
            f"its weights are stored as {own}, which the host does not convert to {storage}; "
            "use --storage as-is, or another file of the model"
        )


def held_bytes(tensor: StoredTensor, linear: bool, own: str, storage: Storage) -> int:
    """Bytes of one tensor on the card; linear: it is the weight of a linear layer; own: `own_storage`."""
    n = tensor.elements
    if tensor.stored in (*PACKED, *QUANTIZED):
        return tensor.nbytes
    if tensor.stored == FP8_SCALED:
        return tensor.nbytes if storage in ("as-is", "fp8") else 2 * n
    if own == "GGUF":
        if not linear or tensor.stored in PLAIN:
            return 2 * n
        more, less = UNPACKED_Q4_K if tensor.stored == "Q4_K" else (1, 1)
        return tensor.nbytes * more // less
    if tensor.stored not in (*PLAIN, *EIGHT_BITS):
        return tensor.nbytes
    if linear and storage in ("nf4", "fp4"):
        return -(-n // 2) + 4 * -(-n // 64) + 64
    if storage == "fp8" or (storage == "as-is" and own == "FP8"):
        return n
    return 2 * n
