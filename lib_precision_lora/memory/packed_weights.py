"""bitsandbytes' 4-bit weights in a safetensors file, as the weights that they stand for.

`X.weight` holds two codes per byte; beside it stand `X.weight.absmax`, `.quant_map`, for nested statistics
`.nested_absmax` and `.nested_quant_map`, and `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`): a few
hundred bytes of JSON with the logical shape. Source: `QuantState.as_dict` of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from typing import Any

from lib_precision_lora.memory.quantized_layers import quantized_layers
from lib_precision_lora.memory.tensors import MOST_AXES, Header, HeaderError, StoredTensor

MARK = ".quant_state.bitsandbytes__"
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
LARGEST_STATE = 2**12


def logical_tensors(header: Header) -> dict[str, StoredTensor]:
    """The file's tensors, a packed weight as one of its logical shape, with the bytes of its statistics; a
    quantized one with those of its scales (`quantized_layers.py`).

    Reads the quant states, and nothing else of the data. Raises `HeaderError` for one that is damaged.
    """
    quantized, scales = quantized_layers(header)
    states = {name.partition(MARK)[0]: name for name in header.tensors if MARK in name}
    if not states:
        return {
            name: quantized.get(name, tensor) for name, tensor in header.tensors.items() if name not in scales
        }
    belonging = (
        {weight + ending for weight in states for ending in STATISTICS} | set(states.values()) | scales
    )
    tensors = {}
    with header.path.open("rb") as file:
        for name, tensor in header.tensors.items():
            if name in belonging:
                continue
            if name in states:
                state = header.tensors[states[name]]
                file.seek(state.offset)
                shape = _shape(header, state, file.read(min(state.nbytes, LARGEST_STATE)))
                if tensor.nbytes != -(-math.prod(shape) // 2):
                    raise HeaderError(
                        f"{header.path}: {name} has {tensor.nbytes} bytes, its quant state says shape "
                        f"{list(shape)}; the file is damaged, download it again."
                    )
                statistics = (header.tensors.get(name + ending) for ending in STATISTICS)
                nbytes = tensor.nbytes + sum(part.nbytes for part in statistics if part is not None)
                kind = state.name.partition(MARK)[2].upper()
                tensor = StoredTensor(name, shape, kind, nbytes, tensor.offset)
            tensors[name] = quantized.get(name, tensor)
    return tensors


def _shape(header: Header, state: StoredTensor, text: bytes) -> tuple[int, ...]:
    try:
        entries: Any = json.loads(text)
        shape = tuple(entries["shape"])
        if len(shape) <= MOST_AXES and all(type(size) is int and 0 <= size < 2**60 for size in shape):
            return shape
        reason = f"its shape is not one of at most {MOST_AXES} sizes"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    raise HeaderError(
        f"{header.path}: {state.name} cannot be read ({reason}); the file is damaged, download it again."
    )
