"""What a branch takes on a device, from the shapes of its steps alone: before anything is placed or read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_precision_lora.adapters.operators import Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Dense, Hadamard, Kronecker, LowRank
from lib_precision_lora.branch.effective import EffectiveWeight
from lib_precision_lora.branch.rows import DENSE_BLOCK_BYTES, WORKSPACE_BYTES
from lib_precision_lora.branch.sites import Kind
from lib_precision_lora.branch.stack import low_rank

FP32 = 4
FP16 = 2


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one module's branch takes on a device.

    factors: the sizes of the tensors that are placed there; shared: of these, the bytes that need no
    memory of their own where the file's tensors lie on the same device (a CPU); workspace: what a forward
    takes on top, whatever the count of tokens, once they fill a chunk; token_bytes: before that, for each
    token, next to fixed_bytes; position_bytes: for each position of a convolution, whose parts are not cut.
    """

    factors: tuple[int, ...] = ()
    shared: int = 0
    token_bytes: int = 0
    fixed_bytes: int = 0
    position_bytes: int = 0

    @property
    def factor_bytes(self) -> int:
        return sum(self.factors)

    def workspace_bytes(self, tokens: int) -> int:
        """tokens: rows of the input, or positions of the largest sample."""
        return min(WORKSPACE_BYTES, tokens * self.token_bytes) + tokens * self.position_bytes + self.fixed_bytes

    def with_bias(self, rows: int) -> Footprint:
        """Beside the change of a bias, fp32."""
        return replace(self, factors=(*self.factors, rows * FP32), shared=self.shared + rows * FP32)


def norm_footprint(width: int, vectors: int) -> Footprint:
    """A norm's changes of weight and bias: fp32 vectors, and fp32 copies of its input."""
    return Footprint((width * FP32,) * vectors, vectors * width * FP32, token_bytes=16 * width)


def weight_footprint(weight: EffectiveWeight, kind: Kind, half: bool) -> Footprint:
    """The branch of a linear, conv or embedding weight.

    weight: may be a sketch; half: whether factors are multiplied in fp16.
    """
    if kind in ("embedding", "shadow"):
        return Footprint(token_bytes=6 * FP32 * weight.stored.shape[-1])
    rows, columns = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
    stack = _Stack(low_rank(weight.steps), half)
    sizes = [(size, False) for size in stack.made()] + [(size, True) for size in stack.kept()]
    sizes += [(_bytes(tensor), True) for tensor in _others(weight)]
    turned = any(piece.turns for piece in weight.pieces) or any(isinstance(s, Left) for s in weight.steps)
    fixed = stack.recast() + _dense_blocks(weight.steps)
    conv = kind == "conv"
    per_token = FP32 * ((3 if turned else 2) * (rows + columns) + 3 * stack.rank)
    per_position = FP32 * (2 * stack.rank + (3 * rows if turned else 0) + _kronecker_width(weight.steps))
    return Footprint(
        tuple(size for size, _ in sizes),
        sum(size for size, shared in sizes if shared),
        token_bytes=FP32 * 2 * weight.stored.shape[0] if conv else per_token,
        fixed_bytes=fixed,
        position_bytes=per_position if conv else 0,
    )


class _Stack:
    """The sizes of a stack of low-rank additions (`stack.build_stack`)."""

    def __init__(self, additions: Sequence[Add], half: bool) -> None:
        self.half = half
        self.ups: list[tuple[int, int, int]] = []  # elements, bytes of one, elements made anew
        self.downs: list[tuple[int, int, int]] = []
        self.rank = 0
        for step in additions:
            assert isinstance(step.term, LowRank)
            rows, rank = step.stop - step.start, step.term.rank
            self.rank += rank
            up_size = FP32 if step.row_change is not None else step.term.up.element_size()
            down_size = FP32 if step.columns else step.term.down.element_size()
            up_new = half or step.row_change is not None or not step.term.up.is_contiguous()
            down_new = half or bool(step.columns)
            self.ups.append((rows * rank, FP16 if half else up_size, up_new))
            self.downs.append((step.term.down.numel(), FP16 if half else down_size, down_new))
        self._joined = len(additions) > 1

    def made(self) -> Iterator[int]:
        """Tensors that are made for the device in any case."""
        if self.rank:
            yield from (self.rank * FP32, self.rank * FP32)  # exponents and scales
        if self._joined and self.downs:
            yield sum(count for count, _, _ in self.downs) * max(size for _, size, _ in self.downs)
        yield from (count * size for count, size, new in self.ups if new or self._joined)
        yield from (count * size for count, size, new in self.downs if new and not self._joined)

    def kept(self) -> Iterator[int]:
        """Tensors that are the file's own, where they lie on the device already."""
        if not self._joined:
            yield from (count * size for count, size, new in (*self.ups, *self.downs) if not new)

    def recast(self) -> int:
        """fp32 copies of the factors while they are multiplied."""
        if self.half:
            return 0
        widths = [max((size for _, size, _ in side), default=FP32) for side in (self.ups, self.downs)]
        counts = [sum(count for count, _, _ in side) for side in (self.ups, self.downs)]
        return max((FP32 * count for count, size in zip(counts, widths, strict=True) if size < FP32), default=0)


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
    yield from operator.tensors()


def _dense_blocks(steps: Sequence[Add | Left]) -> int:
    """The fp32 block of a dense or Hadamard term that is at hand, its source, and its product."""
    streamed = [
        min(DENSE_BLOCK_BYTES, FP32 * math.prod(step.term.size))
        for step in steps
        if isinstance(step, Add) and isinstance(step.term, (Dense, Hadamard))
    ]
    return 3 * max(streamed, default=0)


def _kronecker_width(steps: Sequence[Add | Left]) -> int:
    return max(
        (2 * step.term.size[0] for step in steps if isinstance(step, Add) and isinstance(step.term, Kronecker)),
        default=0,
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def half_precision(dtype: torch.dtype) -> bool:
    return dtype == torch.float16
