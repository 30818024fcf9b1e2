"""Quantized layers of a safetensors file as the weights that they stand for: comfy-kitchen's, and scaled FP8.

    X.comfy_quant      JSON in bytes: {"format": …, "convrot": …}; or all of them in the file's metadata, as
                       `_quantization_metadata`: {"layers": {X: {…}}}
    X.weight           codes, padded: NVFP4 and 4-bit integers two to a byte
    X.weight_scale, X.weight_scale_2, X.input_scale
    scaled_fp8         a file of scaled FP8: beside X.weight stand X.scale_weight and X.scale_input

The logical shape is not in the file where codes are padded: columns are then those of the padding, up to 15
(NVFP4) or 31 (MXFP8) more. Sources: ComfyUI's `convert_old_quants`; Forge Neo 2.26's `convert_quantization`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor, shortened

CONFIGURATION, METADATA = ".comfy_quant", "_quantization_metadata"
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")
FP8_SCALES = (".scale_weight", ".scale_input")
FP8_MARK = "scaled_fp8"
FP8_SCALED = "FP8 scaled"
FORMATS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "float8_e4m3fn": (FP8_SCALED, 1),
        "float8_e5m2": (FP8_SCALED, 1),
        "nvfp4": ("NVFP4", 2),
        "mxfp8": ("MXFP8", 1),
        "int8_tensorwise": ("INT8", 1),
        "convrot_w4a4": ("INT4", 2),
    }
)
"""Format → how it is called, and values of one stored element."""

LARGEST_CONFIGURATION = 2**12


def quantized_layers(header: Header) -> tuple[dict[str, StoredTensor], frozenset[str]]:
    """(weights by name, with the bytes of their scales; names of the tensors that belong to them).

    Reads the configurations, and nothing else of the data. Raises `HeaderError` for one that is damaged, or
    of a format that is not known.
    """
    weights, belonging = {}, {name for name in header.tensors if name.endswith(CONFIGURATION)}
    for layer, configuration in _configurations(header):
        kind, values = _format(header, layer, configuration)
        weight = header.tensors.get(f"{layer}.weight")
        if weight is not None and len(weight.shape) > 0:
            belonging |= {layer + ending for ending in SCALES}
            shape = (*weight.shape[:-1], weight.shape[-1] * values)
            weights[weight.name] = _with_scales(header, weight, shape, kind, SCALES)
    for name in header.tensors:
        layer, mark, _ = name.rpartition(FP8_SCALES[0])
        weight = header.tensors.get(f"{layer}.weight") if mark and name.endswith(mark) else None
        if weight is not None:
            belonging |= {layer + ending for ending in FP8_SCALES}
            if weight.stored.startswith("F8_"):
                weights[weight.name] = _with_scales(header, weight, weight.shape, FP8_SCALED, FP8_SCALES)
        elif name.rpartition(".")[2] == FP8_MARK:
            belonging.add(name)
    return weights, frozenset(belonging)


def _with_scales(
    header: Header, weight: StoredTensor, shape: tuple[int, ...], kind: str, endings: tuple[str, ...]
) -> StoredTensor:
    layer = weight.name.removesuffix(".weight")
    parts = (header.tensors.get(layer + ending) for ending in endings)
    nbytes = weight.nbytes + sum(part.nbytes for part in parts if part is not None)
    return StoredTensor(weight.name, shape, kind, nbytes, weight.offset)


def _configurations(header: Header) -> Iterator[tuple[str, Any]]:
    """(layer, what its configuration says)."""
    whole = header.metadata.get(METADATA)
    if isinstance(whole, str):
        layers = _parsed(header, METADATA, whole)
        layers = layers.get("layers") if isinstance(layers, dict) else None
        if layers is not None and not isinstance(layers, dict):
            raise _damaged(header, METADATA, "its layers are no object")
        yield from (layers or {}).items()
    names = [name for name in header.tensors if name.endswith(CONFIGURATION)]
    if not names:
        return
    with header.path.open("rb") as file:
        for name in names:
            tensor = header.tensors[name]
            file.seek(tensor.offset)
            text = file.read(min(tensor.nbytes, LARGEST_CONFIGURATION))
            yield name.removesuffix(CONFIGURATION), _parsed(header, name, text)


def _parsed(header: Header, name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(header, name, str(error)) from error


def _format(header: Header, layer: str, configuration: Any) -> tuple[str, int]:
    found = configuration.get("format") if isinstance(configuration, dict) else None
    if not isinstance(found, str):
        raise _damaged(header, layer + CONFIGURATION, "it names no format")
    if found not in FORMATS:
        raise HeaderError(
            f"{header.path}: {shortened(layer)} has the format {shortened(found)!r}, which is not known "
            f"(known: {', '.join(FORMATS)}); use another file of the model."
        )
    return FORMATS[found]


def _damaged(header: Header, name: str, reason: str) -> HeaderError:
    return HeaderError(
        f"{header.path}: {shortened(name)} cannot be read ({reason}); the file is damaged, download it again."
    )
