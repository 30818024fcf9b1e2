"""What a branch takes on a device, from the shapes of its steps alone: before anything is placed or read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lib_precision_lora.adapters.operators import Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Dense, Hadamard, LowRank
from lib_precision_lora.branch.chunks import FP32, WORKSPACE_BYTES, token_bytes
from lib_precision_lora.branch.effective import EffectiveWeight
from lib_precision_lora.branch.rows import DENSE_BLOCK_BYTES
from lib_precision_lora.branch.sites import Kind, Site
from lib_precision_lora.branch.stack import low_rank

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
        return (
            min(WORKSPACE_BYTES, tokens * self.token_bytes) + tokens * self.position_bytes + self.fixed_bytes
        )

    def with_bias(self, rows: int) -> Footprint:
        """Beside the change of a bias, fp32."""
        return replace(self, factors=(*self.factors, rows * FP32), shared=self.shared + rows * FP32)


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
    stack = _Stack(low_rank(weight.steps), half)
    sizes = [(size, False) for size in stack.made()] + [(size, True) for size in stack.kept()]
    sizes += [(_bytes(tensor), True) for tensor in _others(weight)]
    turns = [turn for piece in weight.pieces for turn in piece.turns]
    return Footprint(
        tuple(size for size, _ in sizes),
        sum(size for size, shared in sizes if shared),
        token_bytes=token_bytes(inputs, outputs, stack.rank, weight.steps, turns, copies),
        fixed_bytes=int(stack.recast() * copies) + _dense_blocks(weight.steps),
        position_bytes=_position_bytes(weight, stack.rank, turns, copies) if kind == "conv" else 0,
    )


def _position_bytes(weight: EffectiveWeight, rank: int, turns: Sequence[Turn], copies: float) -> int:
    """What the forward of a convolution makes for all positions of a sample at once, for each of them."""
    outputs, channels = weight.stored.shape[:2]
    numbers = rank * copies
    if turns:
        numbers += 4.0 * channels + outputs
    whole = [s for s in weight.steps if isinstance(s, Add) and not isinstance(s.term, LowRank)]
    if whole:
        numbers += 2 * outputs + channels
        numbers += outputs if any(isinstance(step, Left) for step in weight.steps) or turns else 0
    return int(FP32 * numbers)


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
        """fp32 copies of the factors while they are multiplied: of one side at a time."""
        if self.half:
            return 0
        sides = [side for side in (self.ups, self.downs) if any(size < FP32 for _, size, _ in side)]
        return max((FP32 * sum(count for count, _, _ in side) for side in sides), default=0)


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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
