"""What the branches of LoRA files take on a card, layer by layer, from the files' headers.

All low-rank terms that files put beside one layer are one stack: down [total rank, columns], one up per range
of rows, and 2 · [total rank] fp32, in fp16 (`half`) or in the files' own types. Where these differ within a
tensor, it is of the type that holds both: fp16 beside bf16 makes fp32.

A stack of nothing else is plain where a card multiplies in the type of the activations (`plain`): its factors
are of this type, in bf16 in two parts unless the files are bf16, and [total rank] fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from lib_precision_lora.memory.architecture import Request
from lib_precision_lora.memory.checkpoint import Layer
from lib_precision_lora.memory.chunks import (
    FP32,
    HALF_COPIES,
    NORM_BYTES,
    SINGLE_COPIES,
    Load,
    dense_block_bytes,
)
from lib_precision_lora.memory.header_footprint import HeaderFootprint
from lib_precision_lora.memory.lora_header import LoraLayer
from lib_precision_lora.memory.lora_terms import ELEMENT, LowRank, Terms, terms


@dataclass(slots=True)
class Beside:
    """What all files together put beside one layer, in their order.

    layer: None where the checkpoint has none of that name; placed: rows [start, stop) and their terms;
    phases: of each, how often the outputs were turned before its low-rank terms.
    """

    layer: Layer | None
    placed: list[tuple[int, int, Terms]] = field(default_factory=list)
    phases: list[int] = field(default_factory=list)

    def add(self, start: int, stop: int, new: Terms) -> None:
        """The terms of one more adapter; where it turns inputs, in the columns of those before it too."""
        if new.turn is not None:
            self.placed = [
                (first, last, old.with_columns_turned() if first < stop and start < last else old)
                for first, last, old in self.placed
            ]
        self.phases.append((self.phases[-1] if self.phases else 0) + (new.left is not None))
        self.placed.append((start, stop, new))


Plain = Literal["F16", "BF16"]
"""The type of the activations, where plain stacks are multiplied in it."""


def factor_sizes(layers: Iterable[LoraLayer], half: bool, plain: Plain | None = None) -> tuple[int, ...]:
    """Every allocation of a patch set in bytes; layers: of all its files; half: the host computes in fp16."""
    return tuple(size for beside in _beside(layers) for size in _footprint(beside, half, plain).factors)


def workspace_bytes(
    layers: Iterable[LoraLayer], request: Request, half: bool, plain: Plain | None = None
) -> int:
    """What a forward of the branches takes beyond the base's own activations, at most: branches run one at
    a time. layers: as for `factor_sizes`; those of no known layer of the checkpoint do not run."""
    return max(
        (
            _footprint(beside, half, plain).workspace_bytes(_tokens(beside.layer, request))
            for beside in _beside(layer for layer in layers if layer.place is not None)
            if beside.layer is not None
        ),
        default=0,
    )


def layer_footprints(
    layers: Iterable[LoraLayer], half: bool, plain: Plain | None = None
) -> dict[str, HeaderFootprint]:
    """The footprint of each layer of the checkpoint that the files are for, by its name."""
    return {
        beside.layer.name: _footprint(beside, half, plain)
        for beside in _beside(layers)
        if beside.layer is not None
    }


def _tokens(layer: Layer, request: Request) -> int:
    """Rows of a linear layer's input; positions of one sample of a convolution's."""
    return request.tokens_per_image(layer.flow) if layer.kernel else request.tokens(layer.flow)


def _beside(layers: Iterable[LoraLayer]) -> Iterable[Beside]:
    found: dict[object, Beside] = {}
    for adapter in layers:
        own = terms(adapter)
        if adapter.place is None:
            rows = max((part.rows for part in own.low_rank), default=0)
            found[len(found), adapter.name] = unknown = Beside(None)
            unknown.add(0, rows, own)
            continue
        place = adapter.place
        known = found.setdefault(place.layer.name, Beside(place.layer))
        known.add(place.start, place.stop, own)
    return found.values()


def _footprint(beside: Beside, half: bool, plain: Plain | None) -> HeaderFootprint:
    if plain is not None and beside.layer is not None and _is_plain(beside, beside.layer, plain):
        return _plain_footprint(beside, beside.layer, plain)
    parts = [part for _, _, own in beside.placed for part in own.low_rank]
    rank = sum(part.rank for part in parts)
    sizes = [rank * FP32] * 2 if rank else []
    down = [(max(part.columns for part in parts), parts)] if parts else []
    recast = 0
    for types, joined in (
        ("down", down),
        ("up", list(_up_blocks(beside))),
    ):
        copies = 0
        for length, together in joined:
            element = _element([getattr(part, types) for part in together], half)
            count = length * sum(part.rank for part in together)
            sizes.append(count * element)
            copies += FP32 * count if element < FP32 and not half else 0
        recast = max(recast, copies)
    sizes += [size for _, _, own in beside.placed for size in own.others]
    if beside.layer is None:
        return HeaderFootprint(tuple(sizes))
    layer, all_terms = beside.layer, [own for _, _, own in beside.placed]
    if not layer.columns:
        return HeaderFootprint(tuple(sizes), token_bytes=NORM_BYTES * layer.rows)
    copies_of_operand = HALF_COPIES if half else SINGLE_COPIES
    load = Load(
        layer.rows,
        max([layer.columns * math.prod(layer.kernel), *(part.columns for part in parts)]),
        rank,
        copies_of_operand,
        whole=any(own.whole for own in all_terms),
        left=max((own.left for own in all_terms if own.left is not None), default=None),
        turn=max((own.turn for own in all_terms if own.turn is not None), default=None),
    )
    dense = max((dense_block_bytes(own.dense) for own in all_terms if own.dense), default=0)
    return HeaderFootprint(
        tuple(sizes),
        token_bytes=load.token_bytes(),
        fixed_bytes=int(recast * copies_of_operand) + dense,
        position_bytes=load.position_bytes(layer.columns) if layer.kernel else 0,
    )


def _is_plain(beside: Beside, layer: Layer, plain: Plain) -> bool:
    """Whether nothing but a stack stands beside the layer, and is multiplied as it is; of convolutions, that
    is so in fp16 alone."""
    stacked = all(own == Terms(own.low_rank) and own.low_rank for _, _, own in beside.placed)
    return stacked and bool(layer.columns) and (not layer.kernel or plain == "F16")


def _plain_footprint(beside: Beside, layer: Layer, plain: Plain) -> HeaderFootprint:
    """As `branch.arithmetic.plain_form.PlainForm` counts it."""
    parts = [part for _, _, own in beside.placed for part in own.low_rank]
    rank, element = sum(part.rank for part in parts), ELEMENT[plain]
    split = plain == "BF16"
    down_parts = max(_parts(part.down, plain) for part in parts)
    up_parts = max(_parts(part.up, plain) for part in parts)
    columns = 1 + up_parts if split else 1
    sizes = [down_parts * rank * max(part.columns for part in parts) * element, rank * FP32]
    sizes += [2 * element] if split else []
    made = 0
    for height, together in _up_blocks(beside):
        count = height * sum(part.rank for part in together)
        sizes.append(up_parts * count * element)
        made = max(made, columns * count * element if split else 0)
    if layer.kernel:
        return HeaderFootprint(tuple(sizes), fixed_bytes=made, position_bytes=rank * element)
    token_bytes = rank * (FP32 * down_parts + element * columns)
    return HeaderFootprint(tuple(sizes), token_bytes=token_bytes, fixed_bytes=made)


def _parts(stored: str, plain: Plain) -> int:
    return 2 if plain == "BF16" and stored != plain else 1


def _up_blocks(beside: Beside) -> Iterator[tuple[int, list[LowRank]]]:
    """The ranges of rows that the same low-rank terms are added to between two turns of outputs: their
    height, and these terms."""
    for phase in sorted(set(beside.phases)):
        here = [
            (start, stop, own.low_rank)
            for (start, stop, own), own_phase in zip(beside.placed, beside.phases, strict=True)
            if own_phase == phase
        ]
        edges = sorted({edge for start, stop, _ in here for edge in (start, stop)})
        for low, high in pairwise(edges):
            together = [
                part for start, stop, parts in here if start <= low and high <= stop for part in parts
            ]
            if together:
                yield high - low, together


def _element(types: Sequence[str], half: bool) -> int:
    """Bytes per element of factors side by side."""
    if half:
        return ELEMENT["F16"]
    mixed = FP32 if len(set(types)) > 1 else 0
    return max(mixed, *(ELEMENT[each] for each in types))
