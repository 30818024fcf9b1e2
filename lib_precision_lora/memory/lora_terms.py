"""What one adapter puts beside its layer, from the shapes in its file's header.

LoRA, DoRA    up · down of the file's types; DoRA also [rows] or [columns] fp32, and up or down in fp32
LoHa          up · down of rank r₁ · r₂ in fp32 while that multiplies less than a dense matrix, else a · b
LoKr          left and right factors, as in the file
GLoRA         two of up · down, W0 a1 · a2 in fp32 and b1 · b2; k times the rank on a kernel of k positions
(IA)³         [rows] or [columns] fp32
OFT, BOFT     the rotations in fp32, and per stage of BOFT two orders; of outputs or of inputs
sparse rest   a row and a column, int32, for each value
diff          nothing (streamed); a vector: fp32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lib_precision_lora.memory.chunks import (
    BLOCK_COPIES,
    FP32,
    ORDERED_BLOCK_COPIES,
    SCALE_COPIES,
    chain_copies,
)
from lib_precision_lora.memory.lora_header import MAGNITUDES, LoraLayer, triangle_size
from lib_precision_lora.memory.tensors import StoredTensor

ELEMENT = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element on the card by type."""

MOST_STAGES = 32
"""A butterfly's stages are as many as the number of its inputs has binary digits, at most."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """`up · down`; rows, columns: of the product, columns with the kernel; up, down: their types."""

    rank: int
    rows: int
    columns: int
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class Terms:
    """low_rank: what joins the layer's stack; others: bytes of each other tensor; whole: whether a term is
    not of low rank; dense: elements of one that is streamed; left, turn: as in `chunks.Load`."""

    low_rank: tuple[LowRank, ...] = ()
    others: tuple[int, ...] = ()
    whole: bool = False
    dense: int = 0
    left: float | None = None
    turn: float | None = None

    def with_columns_turned(self) -> Terms:
        """After a turn of inputs, which moves through the terms before it into their columns."""
        return replace(self, low_rank=tuple(replace(part, down="F32") for part in self.low_rank))


def terms(layer: LoraLayer) -> Terms:
    """Those of one adapter at strength 1. Exact, but for layers whose file is damaged."""
    found = _FAMILIES[layer.kind.removesuffix(" with dora")](layer)
    magnitude = _first(layer, *MAGNITUDES)
    if magnitude is not None:
        found = _decomposed(found, magnitude, _kernel(layer))
    bias = _first(layer, "diff_b", "lora_up_bias")
    if bias is not None:
        found = replace(found, others=(*found.others, FP32 * bias.elements))
    rest = layer.factors.get("bias_values")
    return found if rest is None else _with_rest(found, rest)


def _with_rest(inner: Terms, values: StoredTensor) -> Terms:
    """A sparse rest holds a row and a column, int32, for each value; made dense in row blocks."""
    parts = (FP32 * values.elements, FP32 * values.elements, _held(values))
    dense = max((part.rows * part.columns for part in inner.low_rank), default=0)
    return replace(inner, others=(*inner.others, *parts), whole=True, dense=max(inner.dense, dense))


def _first(layer: LoraLayer, *roles: str) -> StoredTensor | None:
    for role in roles:
        if role in layer.factors:
            return layer.factors[role]
    return None


def _kernel(layer: LoraLayer) -> int:
    """Positions of the layer's kernel; 1 where the layer is not known."""
    return 1 if layer.place is None else math.prod(layer.place.layer.kernel)


def _decomposed(inner: Terms, magnitude: StoredTensor, kernel: int) -> Terms:
    on_input = magnitude.name.endswith(".dora_scale") and len(magnitude.shape) > 1 and magnitude.shape[0] == 1
    change = FP32 * magnitude.elements * (kernel if on_input else 1)
    others = (*inner.others, change)
    if on_input:
        return replace(inner.with_columns_turned(), others=others, turn=SCALE_COPIES)
    scaled = tuple(replace(part, up="F32") for part in inner.low_rank)
    return replace(inner, low_rank=scaled, others=others, left=SCALE_COPIES)


def _lora(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if not {"lora_up", "lora_down"} <= factors.keys():
        return _as_stored(layer)
    up, down, mid = factors["lora_up"], factors["lora_down"], factors.get("lora_mid")
    rank, columns, stored = _rows(down), _columns(down), _type(down)
    if mid is not None:
        rank, columns, stored = _rows(mid), columns * math.prod(mid.shape[2:]), "F32"
    return Terms((LowRank(rank, _rows(up), columns, _type(up), stored),))


def _loha(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if not {"hada_w1_a", "hada_w1_b", "hada_w2_b"} <= factors.keys():
        return _as_stored(layer)
    first, core = factors["hada_w1_b"], factors.get("hada_t1")
    rows = factors["hada_w1_a"].elements // max(1, _rows(first))
    columns = _columns(first) * (1 if core is None else math.prod(core.shape[2:]))
    rank = _rows(first) * _rows(factors["hada_w2_b"])
    if rank * (rows + columns) < rows * columns:
        return Terms((LowRank(rank, rows, columns, "F32", "F32"),))
    held = [_held(factors[role]) for role in ("hada_w1_a", "hada_w2_a") if role in factors]
    for number in ("1", "2"):
        inner, core = factors[f"hada_w{number}_b"], factors.get(f"hada_t{number}")
        folded = 0 if core is None else FP32 * inner.elements * math.prod(core.shape[2:])
        held.append(folded or _held(inner))
    return Terms(others=tuple(held), whole=True, dense=rows * columns)


def _lokr(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if {"lokr_w1_a", "lokr_w1_b"} <= factors.keys():
        held = [FP32 * _rows(factors["lokr_w1_a"]) * _columns(factors["lokr_w1_b"])]
    else:
        held = [_held(factors[role]) for role in ("lokr_w1",) if role in factors]
    core = factors.get("lokr_t2")
    if core is not None and {"lokr_w2_a", "lokr_w2_b"} <= factors.keys():
        outer, inner = factors["lokr_w2_a"], factors["lokr_w2_b"]
        held += [FP32 * outer.elements, FP32 * inner.elements * math.prod(core.shape[2:])]
    else:
        roles = ("lokr_w2",) if "lokr_w2" in factors else ("lokr_w2_a", "lokr_w2_b")
        held += [_held(factors[role]) for role in roles if role in factors]
    return Terms(others=tuple(held), whole=True)


def _glora(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if not {"a1", "a2", "b1", "b2"} <= factors.keys():
        return _as_stored(layer)
    a1, a2, b1, b2 = ((_rows(factors[part]), _columns(factors[part])) for part in ("a1", "a2", "b1", "b2"))
    old = a1[0] == b1[0] == a2[1] == b2[1] and a1[0] < a1[1]
    up, down = ("b2", "b1") if old else ("b1", "b2")
    rank, inputs = a1 if old else a2
    columns, stored = _columns(factors[down]), _type(factors[down])
    if "bm" in factors:
        columns, stored = columns * math.prod(factors["bm"].shape[2:]), "F32"
    rows = _rows(factors[up])
    kernel = _kernel(layer)
    seen = LowRank(rank * kernel, rows, inputs * kernel, "F32", "F32")
    return Terms((seen, LowRank(rank, rows, columns, _type(factors[up]), stored)))


def _oft(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if "oft_R" in factors:
        packed = factors["oft_R"]
        size = triangle_size(_columns(packed))
        return Terms(others=(FP32 * _rows(packed) * size * size,), turn=BLOCK_COPIES)
    if "oft_r" in factors:
        turns = FP32 * factors["oft_r"].elements
        if "oft_s" not in factors:
            return Terms(others=(turns,), left=BLOCK_COPIES)
        scale = FP32 * factors["oft_s"].elements
        return Terms(others=(turns, scale), left=SCALE_COPIES, turn=BLOCK_COPIES)
    rescale = [FP32 * factors["rescale"].elements] if "rescale" in factors else []
    blocks, parts = _stages(factors["oft_blocks"], ordered_first=True)
    parts += [SCALE_COPIES] * len(rescale)
    return Terms(others=(*blocks, *rescale), left=parts[0] if len(parts) == 1 else chain_copies(parts))


def _boft(layer: LoraLayer) -> Terms:
    factors = layer.factors
    if "boft_R" not in factors:
        return _oft(layer)
    blocks, parts = _stages(factors["boft_R"], ordered_first=False)
    turn = parts[0] if len(parts) == 1 else chain_copies(parts)
    if "boft_s" not in factors:
        return Terms(others=blocks, turn=turn)
    return Terms(others=(*blocks, FP32 * factors["boft_s"].elements), left=SCALE_COPIES, turn=turn)


def _stages(blocks: StoredTensor, ordered_first: bool) -> tuple[tuple[int, ...], list[float]]:
    """Sizes of the tensors of a rotation, and the copies that each stage makes.

    blocks: [count, b, b], or [stages, count, b, b], each stage between an order of 8-byte numbers and its
    inverse; ordered_first: the first stage too.
    """
    if len(blocks.shape) != 4 or blocks.shape[0] > MOST_STAGES:
        return (FP32 * blocks.elements,), [BLOCK_COPIES]
    stages, count, size = blocks.shape[:3]
    sizes: list[int] = []
    parts: list[float] = []
    for stage in range(stages):
        ordered = ordered_first or stage > 0
        sizes += [FP32 * blocks.elements // stages, *([8 * count * size] * (2 if ordered else 0))]
        parts.append(ORDERED_BLOCK_COPIES if ordered else BLOCK_COPIES)
    return tuple(sizes), parts


def _diff(layer: LoraLayer) -> Terms:
    diff = _first(layer, "diff", "set_weight")
    if diff is None:
        return Terms()
    if len(diff.shape) == 1:
        return Terms(others=(FP32 * diff.elements,))
    replaced = "diff" not in layer.factors
    return Terms(whole=True, dense=diff.elements, left=SCALE_COPIES if replaced else None)


def _ia3(layer: LoraLayer) -> Terms:
    """Where neither the file's shapes nor the layer's tell the axis, inputs: they take more."""
    values = layer.factors.get("ia3_l") or layer.factors["weight"]
    on_input = layer.place is None or values.elements != layer.place.stop - layer.place.start
    if layer.place is not None and layer.place.layer.columns == values.elements and not on_input:
        by_row = "ia3_l" in layer.factors and (len(values.shape) > 2 or values.shape[:1] != (1,))
        on_input = not by_row
    if on_input:
        return Terms(others=(FP32 * values.elements * _kernel(layer),), turn=SCALE_COPIES)
    return Terms(others=(FP32 * values.elements,), left=SCALE_COPIES)


_FAMILIES: Mapping[str, Callable[[LoraLayer], Terms]] = {
    "lora": _lora,
    "dora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
    "diff": _diff,
    "ia3": _ia3,
}


def _as_stored(layer: LoraLayer) -> Terms:
    apart = ("alpha", *MAGNITUDES, "diff_b", "lora_up_bias")
    return Terms(others=tuple(_held(factor) for role, factor in layer.factors.items() if role not in apart))


def _rows(factor: StoredTensor) -> int:
    return factor.shape[0] if factor.shape else 0


def _columns(factor: StoredTensor) -> int:
    return math.prod(factor.shape[1:])


def _type(factor: StoredTensor) -> str:
    """The type on the card: FP8 is widened to fp16."""
    return factor.stored if factor.stored in ELEMENT else "F16"


def _held(factor: StoredTensor) -> int:
    return factor.elements * ELEMENT[_type(factor)]
