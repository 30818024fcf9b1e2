"""What one forward of the branches takes beyond the base's own activations, at most.

Branches run one at a time, each on blocks of at most `t` tokens; a block holds fp32 copies of its input, its
hidden state and a part of its output:

    linear  4 · (2 t · in + 3 t · r + t · h)   t = min(tokens, W / (4 (2 in + 2 out + 3 r)))
    conv    4 · (p · c + 3 p · r + p · h)      p = positions of one image, c = min(in, W / (8 p))

h = min(out, W / (8 t)); a dense remainder is brought to fp32 in blocks of at most D bytes, besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lib_precision_lora.memory.architecture import Request
from lib_precision_lora.memory.checkpoint import Layer
from lib_precision_lora.memory.factor_sizes import stacked_rank
from lib_precision_lora.memory.lora_header import LoraLayer

WORKSPACE_BYTES = 32 * 2**20
"""W: the bound that the branches keep for the copies of one block."""

DENSE_BLOCK_BYTES = 8 * 2**20
"""D: the bound of one block of a dense remainder."""


@dataclass(frozen=True, slots=True)
class Load:
    """What all files together put beside one layer."""

    layer: Layer
    rank: int
    dense: bool


def loads(adapters: Iterable[LoraLayer]) -> tuple[Load, ...]:
    """One per layer of the checkpoint that an adapter is for."""
    found: dict[str, Load] = {}
    for adapter in adapters:
        if adapter.place is None:
            continue
        layer = adapter.place.layer
        before = found.get(layer.name, Load(layer, 0, False))
        dense = adapter.kind == "diff" and "diff" in adapter.factors
        dense = dense or (adapter.kind.startswith("loha") and not stacked_rank(adapter))
        found[layer.name] = Load(layer, before.rank + stacked_rank(adapter), before.dense or dense)
    return tuple(found.values())


def workspace_bytes(adapters: Iterable[LoraLayer], request: Request) -> int:
    """The largest of all layers, in bytes; adapters: of the diffusion model, of all files."""
    return max((_of_layer(load, request) for load in loads(adapters)), default=0)


def _of_layer(load: Load, request: Request) -> int:
    layer, rank = load.layer, load.rank
    if layer.kernel:
        tokens = request.tokens_per_image(layer.flow)
        columns = min(layer.columns, max(1, WORKSPACE_BYTES // (8 * tokens)))
    else:
        bound = WORKSPACE_BYTES // (4 * (2 * layer.columns + 2 * layer.rows + 3 * rank))
        tokens = min(request.tokens(layer.flow), max(1, bound))
        columns = 2 * layer.columns
    height = min(layer.rows, max(1, WORKSPACE_BYTES // (8 * tokens)))
    whole = 4 * layer.rows * layer.columns * math.prod(layer.kernel)
    dense = 2 * min(DENSE_BLOCK_BYTES, whole) if load.dense else 0
    return 4 * tokens * (columns + 3 * rank + height) + dense
