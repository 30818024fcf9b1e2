"""The allocations that a LoRA's branches make on the card, from the shapes in its header.

    low-rank      down [r, columns], up [rows, r], 2 · [r] fp32       in fp16 (`half`), else as in the file
    DoRA          + [rows] or [columns] fp32; up in fp32 where not half
    LoHa          low-rank of rank r₁ · r₂ while that multiplies less than a dense matrix, else its factors
    LoKr          w1, w2 or their factors, as in the file
    GLoRA         two low-rank terms of one rank: W0 a1 · a2 and b1 · b2, and both ups joined
    OFT, BOFT     the rotations in fp32, and per stage of BOFT two orders of the rows
    diff          nothing (streamed); a vector: fp32

Terms that several files add to the same rows are joined: their ups are there twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from lib_precision_lora.memory.lora_header import LoraLayer
from lib_precision_lora.memory.tensors import StoredTensor

Factors = Mapping[str, StoredTensor]
ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element on the card by type in the file; FP8 is widened to fp16."""

_TURNS = ("oft", "boft", "ia3")


def factor_sizes(layers: Iterable[LoraLayer], half: bool) -> tuple[int, ...]:
    """Every allocation of a patch set in bytes; layers: of all its files; half: the host computes in fp16.

    Exact but for GLoRA on convolutions and for layers whose file is damaged.
    """
    sizes: list[int] = []
    ups: dict[object, list[int]] = {}
    phases: Counter[str] = Counter()
    for layer in layers:
        own = layer_sizes(layer, half)
        sizes += own
        if layer.place is None:
            continue
        place = layer.place
        # What turns the outputs parts the terms before it from its own and later ones.
        phases[place.layer.name] += layer.kind in _TURNS or layer.kind.endswith("dora")
        if stacked_rank(layer) and layer.kind != "glora":
            rows = (place.layer.name, phases[place.layer.name], place.start, place.stop)
            ups.setdefault(rows, []).append(own[1])
    sizes += [sum(joined) for joined in ups.values() if len(joined) > 1]
    return tuple(sizes)


def layer_sizes(layer: LoraLayer, half: bool) -> tuple[int, ...]:
    """The allocations of one adapter alone, in bytes; of a low-rank one down and up come first."""
    family = _FAMILIES[layer.kind.removesuffix(" with dora")]
    vectors = tuple(
        4 * layer.factors[role].elements for role in ("magnitude", "diff_b") if role in layer.factors
    )
    return (*family(layer.factors, half), *vectors)


def stacked_rank(layer: LoraLayer) -> int:
    """The rank that a layer adds to its module's stack; 0 where it is not low-rank."""
    factors = layer.factors
    if layer.kind in ("lora", "dora") and {"up", "down"} <= factors.keys():
        return _rows(factors["down"])
    if layer.kind.startswith("loha"):
        product = _loha(factors)
        return 0 if product is None else product[0]
    return 2 * (layer.rank or 0) if layer.kind == "glora" else 0


def _low_rank(rank: int, rows: int, columns: int, up: int, down: int) -> tuple[int, ...]:
    """up, down: bytes per element."""
    return rank * columns * down, rows * rank * up, 4 * rank, 4 * rank


def _lora_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    if not {"up", "down"} <= factors.keys():
        return _as_stored(factors)
    up, down, mid = factors["up"], factors["down"], factors.get("mid")
    rank, columns = _rows(down), _columns(down)
    down_element = _element(down)
    if mid is not None:
        rank, columns, down_element = _rows(mid), columns * math.prod(mid.shape[2:]), 4
    up_element = 4 if "magnitude" in factors else _element(up)
    if half:
        up_element = down_element = 2
    return _low_rank(rank, _rows(up), columns, up_element, down_element)


def _loha_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    product = _loha(factors)
    if product is None:
        return _as_stored(factors)
    element = 2 if half else 4
    return _low_rank(*product, element, element)


def _loha(factors: Factors) -> tuple[int, int, int] | None:
    """Rank, rows and columns of the Khatri-Rao factors; None where a dense product is cheaper."""
    if not {"hada_w1_a", "hada_w1_b", "hada_w2_b"} <= factors.keys():
        return None
    core = factors.get("hada_t1")
    rows = math.prod(factors["hada_w1_a"].shape) // max(1, _rows(factors["hada_w1_b"]))
    columns = _columns(factors["hada_w1_b"]) * (math.prod(core.shape[2:]) if core is not None else 1)
    rank = _rows(factors["hada_w1_b"]) * _rows(factors["hada_w2_b"])
    return (rank, rows, columns) if rank * (rows + columns) < rows * columns else None


def _lokr_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    if "lokr_w1_a" in factors and "lokr_w1_b" in factors:
        left = 4 * _rows(factors["lokr_w1_a"]) * _columns(factors["lokr_w1_b"])
    else:
        left = _held(factors.get("lokr_w1"))
    core = factors.get("lokr_t2")
    if core is None or not {"lokr_w2_a", "lokr_w2_b"} <= factors.keys():
        right = tuple(
            _held(factors[part]) for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b") if part in factors
        )
        return (left, *right)
    kernel = math.prod(core.shape[2:])
    return left, 4 * factors["lokr_w2_a"].elements, 4 * factors["lokr_w2_b"].elements * kernel


def _glora_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    if not {"a1", "a2", "b1", "b2"} <= factors.keys():
        return _as_stored(factors)
    rank = min(min(factors[part].shape, default=1) for part in ("a1", "a2"))
    up, down = factors["b1"], factors["b2"]
    if up.shape[-1:] != (rank,):
        up, down = down, up
    element = 2 if half else 4
    first = _low_rank(rank, up.elements // rank, factors["a1"].elements // rank, element, element)
    own = (2, 2) if half else (_element(up), _element(down))
    second = _low_rank(rank, up.elements // rank, down.elements // rank, *own)
    return (*first, *second, 2 * up.elements * element)


def _oft_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    blocks = factors["oft_blocks"]
    rescale = (4 * factors["rescale"].elements,) if "rescale" in factors else ()
    if len(blocks.shape) != 4:
        return (4 * blocks.elements, *rescale)
    stages, count, size = blocks.shape[:3]
    stage = (4 * blocks.elements // stages, 8 * count * size, 8 * count * size)
    return (*stage * stages, *rescale)


def _diff_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    diff = factors.get("diff")
    return (4 * diff.elements,) if diff is not None and len(diff.shape) == 1 else ()


def _ia3_sizes(factors: Factors, half: bool) -> tuple[int, ...]:
    return tuple(4 * factors[role].elements for role in ("ia3", "weight") if role in factors)


_FAMILIES: Mapping[str, Callable[[Factors, bool], tuple[int, ...]]] = {
    "lora": _lora_sizes,
    "dora": _lora_sizes,
    "loha": _loha_sizes,
    "lokr": _lokr_sizes,
    "glora": _glora_sizes,
    "oft": _oft_sizes,
    "boft": _oft_sizes,
    "diff": _diff_sizes,
    "ia3": _ia3_sizes,
}


def _as_stored(factors: Factors) -> tuple[int, ...]:
    apart = ("alpha", "magnitude", "diff_b")
    return tuple(_held(factor) for role, factor in factors.items() if role not in apart)


def _rows(factor: StoredTensor) -> int:
    return factor.shape[0] if factor.shape else 0


def _columns(factor: StoredTensor) -> int:
    return math.prod(factor.shape[1:])


def _element(factor: StoredTensor) -> int:
    return ELEMENT.get(factor.stored, 2)


def _held(factor: StoredTensor | None) -> int:
    return 0 if factor is None else factor.elements * _element(factor)
