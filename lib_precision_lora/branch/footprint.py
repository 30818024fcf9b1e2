"""What a branch takes on a device, from the shapes of its steps alone: before anything is placed or read."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Dense, Hadamard, LowRank
from lib_precision_lora.branch.chunks import load
from lib_precision_lora.branch.effective import EffectiveWeight
from lib_precision_lora.branch.operands import up_blocks
from lib_precision_lora.branch.sites import Kind, Site
from lib_precision_lora.branch.stack import UpBlock, low_rank
from lib_precision_lora.memory.chunks import FP32, dense_block_bytes
from lib_precision_lora.memory.footprint import Footprint

FP16 = 2


def footprints(
    weights: Mapping[str, tuple[Site, EffectiveWeight]], half: bool, copies: float
) -> dict[str, Footprint]:
    """The footprint of each module's branch, or of a shadowed parameter, by name.

    weights: by parameter, as `compose.effective_weights` gives them.
    """
    made: dict[str, Footprint] = {}
    for name, (site, weight) in weights.items():
        path, _, attribute = name.rpartition(".")
        rows = weight.stored.shape[0]
        if site.kind == "shadow":
            made[name] = shadow_footprint(weight)
        elif site.kind == "norm":
            vectors = sum(f"{path}.{part}" in weights for part in ("weight", "scale", "bias"))
            made[path] = norm_footprint(rows, vectors)
        elif attribute != "bias":
            bias = f"{path}.bias" in weights
            footprint = weight_footprint(weight, site.kind, half, copies)
            made[path] = footprint.with_bias(rows) if bias else footprint
        elif f"{path}.weight" not in weights:
            made[path] = Footprint(token_bytes=2 * FP32 * rows).with_bias(rows)
    return made


def shadow_footprint(weight: EffectiveWeight) -> Footprint:
    """A second parameter of the same size."""
    return Footprint((weight.stored.nbytes,))


def norm_footprint(width: int, vectors: int) -> Footprint:
    """A norm's changes of weight and bias: fp32 vectors, and fp32 copies of its input."""
    return Footprint((width * FP32,) * vectors, vectors * width * FP32, token_bytes=16 * width)


def weight_footprint(weight: EffectiveWeight, kind: Kind, half: bool, copies: float) -> Footprint:
    """The branch of a linear, conv or embedding weight.

    weight: may be a sketch; half: whether factors are multiplied in fp16; copies: of an operand, as
    `chunks.operand_copies` says.
    """
    outputs, inputs = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
    if kind == "embedding":
        return Footprint(token_bytes=6 * FP32 * inputs)
    stack = _Stack(low_rank(weight.steps), up_blocks(weight.steps, outputs), half)
    sizes = [*stack.sizes, *((_bytes(tensor), True) for tensor in _others(weight))]
    turns = [turn for piece in weight.pieces for turn in piece.turns]
    beside = load(inputs, outputs, stack.rank, weight.steps, turns, copies)
    return Footprint(
        tuple(size for size, _ in sizes),
        sum(size for size, shared in sizes if shared),
        token_bytes=beside.token_bytes(),
        fixed_bytes=int(stack.recast * copies) + _dense_blocks(weight.steps),
        position_bytes=beside.position_bytes(weight.stored.shape[1]) if kind == "conv" else 0,
    )


class _Stack:
    """The tensors of a stack of low-rank additions (`stack.build_stack`).

    sizes: bytes of each, and whether it is the file's own where that lies on the device already; recast:
    bytes of the fp32 copies of factors while they are multiplied, those of one side at a time.
    """

    def __init__(self, additions: Sequence[Add], blocks: Sequence[UpBlock], half: bool) -> None:
        self.rank = sum(_low_rank(step).rank for step in additions)
        self.sizes: list[tuple[int, bool]] = []
        self.recast = 0
        if not additions:
            return
        self.sizes += [(self.rank * FP32, False)] * 2  # exponents and scales
        downs = [(_low_rank(step).down, bool(step.columns)) for step in additions]
        columns = downs[0][0].shape[1]
        self._hold([(columns, self.rank, downs)], half)
        ups = [(_low_rank(step).up, step.row_change is not None) for step in additions]
        self._hold(
            [
                (
                    block[0][2] - block[0][1],
                    sum(_low_rank(additions[number]).rank for number, _, _ in block),
                    [ups[number] for number, _, _ in block],
                )
                for block in blocks
            ],
            half,
        )

    def _hold(self, joined: Iterable[tuple[int, int, Sequence[tuple[Tensor, bool]]]], half: bool) -> None:
        """Factors of one side: length and rank of each joined one, and its parts, changed or as they are."""
        recast = 0
        for length, rank, parts in joined:
            changed = half or any(change for _, change in parts)
            element = FP16 if half else _joined_type(parts).itemsize
            own = changed or len(parts) > 1 or not parts[0][0].is_contiguous()
            self.sizes.append((length * rank * element, not own))
            recast += length * rank * FP32 if element < FP32 and not half else 0
        self.recast = max(self.recast, recast)


def _low_rank(step: Add) -> LowRank:
    assert isinstance(step.term, LowRank)
    return step.term


def _joined_type(parts: Iterable[tuple[Tensor, bool]]) -> torch.dtype:
    """The type of factors side by side, those that are changed in fp32: fp16 beside bf16 makes fp32."""
    types = [torch.float32 if changed else part.dtype for part, changed in parts]
    return functools.reduce(torch.promote_types, types)


def _others(weight: EffectiveWeight) -> Iterator[Tensor]:
    """Tensors beside the stack that are placed as they are, each once."""
    seen: set[int] = set()
    for tensor in _all_others(weight):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _all_others(weight: EffectiveWeight) -> Iterator[Tensor]:
    for piece in weight.pieces:
        yield from _turn_tensors(piece.turns)
        if piece.share is not None:
            yield piece.share
    for step in weight.steps:
        if isinstance(step, Left):
            yield from _operator_tensors(step.operator)
        elif not isinstance(step.term, LowRank):
            if not isinstance(step.term, Dense):
                yield from step.term.tensors()
            yield from _turn_tensors(step.columns)
            if step.row_change is not None:
                yield step.row_change


def _turn_tensors(turns: Iterable[Turn]) -> Iterator[Tensor]:
    for operator, _ in turns:
        yield from _operator_tensors(operator)


def _operator_tensors(operator: Operator) -> Iterator[Tensor]:
    """What an operator has on a device, the orders of a rotation too."""
    if isinstance(operator, Chain):
        for part in operator.parts:
            yield from _operator_tensors(part)
        return
    yield from operator.tensors()
    if isinstance(operator, Blocks):
        yield from (order for order in (operator.order, operator.inverse) if order is not None)


def _dense_blocks(steps: Sequence[Add | Left]) -> int:
    return max(
        (
            dense_block_bytes(math.prod(step.term.size))
            for step in steps
            if isinstance(step, Add) and isinstance(step.term, (Dense, Hadamard))
        ),
        default=0,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
