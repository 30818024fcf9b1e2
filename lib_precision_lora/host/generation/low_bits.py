"""Forge's "Diffusion in Low Bits": its choices, and which of them a checkpoint can take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

OPTION = "forge_unet_storage_dtype"
"""The option's key in the host, and in the `override_settings` of its API."""

_DIFFUSION_MODEL = "model.diffusion_model."
_KEY = "_quantization_metadata"
_LARGEST_HEADER = 100_000_000
"""Bytes; what the safetensors format allows."""


def low_bits_options() -> Mapping[str, tuple[Any, bool]]:
    """Name → (storage type, whether LoRAs are kept in fp16); a storage type of None is the file's own."""
    from modules_forge import main_entry

    options: Mapping[str, tuple[Any, bool]] = main_entry.forge_unet_storage_dtype_options
    return options


def objection(checkpoint: str, storage: Any) -> str | None:
    """Why this checkpoint file cannot be stored in this type; None where nothing is known against it.

    storage: as in `low_bits_options`. The host itself does not ask: it would load nonsense, or fail in the
    first step.
    """
    if storage is None:
        return None
    name = os.path.basename(checkpoint)
    if checkpoint.lower().endswith(".gguf"):
        return f"{name} is a GGUF file, whose weights are quantized already"
    tensors = _diffusion_model_tensors(checkpoint)
    for quantized in ("nf4", "fp4"):
        if any(f"bitsandbytes__{quantized}" in tensor for tensor in tensors):
            already = f"the weights of {name} are quantized to {quantized.upper()} already"
            return None if storage == quantized else already
    if any(tensor.endswith(".comfy_quant") for tensor in tensors):
        return f"the weights of {name} are quantized already"
    if storage not in ("nf4", "fp4"):
        return None
    if any(tensor.endswith(".scale_weight") for tensor in tensors):
        return f"the weights of {name} are FP8 with scales, which {storage.upper()} would lose"
    return _four_bit_objection(storage)


def _four_bit_objection(storage: str) -> str | None:
    """Why this host cannot quantize to 4 bits by itself."""
    from backend import memory_management, operations

    if not getattr(operations, "bnb_avaliable", True):
        return f"{storage.upper()} needs the package bitsandbytes, which this WebUI could not import"
    device = memory_management.get_torch_device()
    if device.type != "cuda":
        return f"the WebUI quantizes to {storage.upper()} on CUDA cards only, and it runs on {device.type}"
    return None


def _diffusion_model_tensors(checkpoint: str) -> list[str]:
    """Names of a safetensors file's tensors, those of the diffusion model where it holds other models too.

    Empty for any other file, and for one that cannot be read: the host will say so itself.
    """
    try:
        with open(checkpoint, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if 0 < size <= _LARGEST_HEADER else {}
            names = [*header, *_configured(header.get("__metadata__"))]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if name.startswith(_DIFFUSION_MODEL)] or names


def _configured(metadata: Any) -> list[str]:
    """The names that the layers' configurations have, where they stand in the metadata instead."""
    layers = json.loads(metadata[_KEY])["layers"] if metadata and _KEY in metadata else {}
    return [f"{layer}.comfy_quant" for layer in layers]
