"""What a branch takes on a device, from the shapes of its steps alone: before anything is placed or read."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_precision_lora.adapters.operators import Blocks, Chain, Operator
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Dense, Hadamard, Kronecker, LowRank, Sparse, Term
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.algebra.reading import reading_bytes
from lib_precision_lora.branch.algebra.sketch import Reads, SketchedWeight
from lib_precision_lora.branch.arithmetic.chunks import Arithmetic, chunk_bytes, token_bytes, whole_terms
from lib_precision_lora.branch.arithmetic.plain_form import PlainForm
from lib_precision_lora.branch.arithmetic.plain_kronecker import KroneckerForm, single_kronecker
from lib_precision_lora.branch.arithmetic.product_cost import ProductCost
from lib_precision_lora.branch.arithmetic.stack import are_neighbours, low_rank, rank_of
from lib_precision_lora.branch.forward.operands import is_plain, up_blocks
from lib_precision_lora.branch.forward.turned_input import turned_before
from lib_precision_lora.branch.forward.wide_input import WideInput
from lib_precision_lora.branch.session.planning.stages import (
    Stage,
    Use,
    all_turns,
    conv_stages,
    largest,
    linear_stage,
    plain_conv_stages,
    plain_stages,
    turned_input_stages,
)
from lib_precision_lora.branch.session.sites import Kind, Site
from lib_precision_lora.memory.chunks import DENSE_BLOCK_BYTES, FP32, NORM_BYTES

INT64 = 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that one module's branch takes on a device.

    factors: the sizes of the tensors that are placed there; shared: of these, the bytes that need no
    memory of their own where the file's tensors lie on the same device (a CPU); stages: what a forward takes
    on top, by tokens or positions; fixed_bytes: whatever their number; attach_bytes: what is alive at once
    while the branch is made, where it reads the base for that; host_bytes: the originals of what is merged,
    which stay in RAM; kept_bytes: in RAM too, what of a DoRA's norms is kept for the next change.
    """

    factors: tuple[int, ...] = ()
    shared: int = 0
    stages: tuple[Stage, ...] = ()
    fixed_bytes: int = 0
    attach_bytes: int = 0
    host_bytes: int = 0
    kept_bytes: int = 0

    @property
    def factor_bytes(self) -> int:
        return sum(self.factors)

    def workspace_bytes(self, tokens: int) -> int:
        """tokens: rows of the input, or positions of the largest sample."""
        return max(self.attach_bytes, largest(self.stages, tokens) + self.fixed_bytes)

    def with_bias(self, rows: int) -> Footprint:
        """Beside the change of a bias, fp32."""
        return replace(self, factors=(*self.factors, rows * FP32), shared=self.shared + rows * FP32)


def footprints(
    weights: Mapping[str, tuple[Site, EffectiveWeight]],
    arithmetic: Arithmetic,
    merged: Collection[str] = (),
) -> dict[str, Footprint]:
    """The footprint of each module's branch, or of a shadowed parameter, by name.

    weights: by parameter, as `compose.effective_weights` gives them; merged: the modules that are merged.
    """
    made: dict[str, Footprint] = {}
    for name, (site, weight) in weights.items():
        path, _, attribute = name.rpartition(".")
        rows = weight.stored.shape[0]
        if path in merged:
            made[path] = _both(made.get(path, Footprint()), merged_footprint(weight, arithmetic.widens))
        elif site.kind == "shadow":
            made[name] = shadow_footprint(weight)
        elif site.kind == "norm":
            vectors = sum(f"{path}.{part}" in weights for part in ("weight", "scale", "bias"))
            made[path] = norm_footprint(rows, vectors)
        elif attribute != "bias":
            bias = f"{path}.bias" in weights
            form = None if bias else _plain_form(site, weight, arithmetic)
            kronecker = None if bias else _kronecker_form(site, weight, arithmetic)
            if kronecker is not None:
                footprint = kronecker_footprint(weight, kronecker)
            elif form is not None:
                footprint = plain_footprint(weight, form, site.kind == "conv")
            else:
                footprint = weight_footprint(weight, site.kind, arithmetic, bias)
            made[path] = footprint.with_bias(rows) if bias else footprint
        elif f"{path}.weight" not in weights:
            made[path] = Footprint(stages=(linear_stage(2 * FP32 * rows),)).with_bias(rows)
    return made


def shadow_footprint(weight: EffectiveWeight) -> Footprint:
    """A second parameter of the same size, from sums in fp32."""
    return Footprint((weight.stored.nbytes,), attach_bytes=3 * FP32 * math.prod(weight.stored.shape))


def merged_footprint(weight: EffectiveWeight, on_cpu: bool) -> Footprint:
    """A merged parameter takes the place of its original, which goes to RAM; while it is made, both stand.

    on_cpu: there the original does not make room for anything.
    """
    size = weight.stored.nbytes
    blocks = reading_bytes(weight.stored.shape, weight.steps, FP32 if on_cpu else 2 * FP32)
    if on_cpu:
        return Footprint((size,), attach_bytes=blocks)
    return Footprint(attach_bytes=size + blocks, host_bytes=size)


def _both(one: Footprint, other: Footprint) -> Footprint:
    """Two parameters that one module merges."""
    return Footprint(
        one.factors + other.factors,
        attach_bytes=one.attach_bytes + other.attach_bytes,
        host_bytes=one.host_bytes + other.host_bytes,
    )


def norm_footprint(width: int, vectors: int) -> Footprint:
    """A norm's changes of weight and bias: fp32 vectors, and fp32 copies of its input."""
    stage = linear_stage(NORM_BYTES * width)
    return Footprint((width * FP32,) * vectors, vectors * width * FP32, (stage,))


def embedding_footprint(weight: EffectiveWeight) -> Footprint:
    """Factors stay where the file's are; the vectors of all ids are treated at once, in fp64."""
    width = math.prod(weight.stored.shape[1:])
    copies = 4 + (len(weight.pieces) > 1)
    downs = [step.term.down for step in low_rank(weight.steps) if isinstance(step.term, LowRank)]
    fixed = 2 * FP32 * max((down.numel() for down in downs), default=0)
    return Footprint(stages=((Use(2 * FP32 * copies * width),),), fixed_bytes=fixed)


def weight_footprint(
    weight: EffectiveWeight, kind: Kind, arithmetic: Arithmetic, bias: bool = False
) -> Footprint:
    """The branch of a linear, conv or embedding weight; weight: may be a sketch; bias: it changes, too."""
    if kind == "embedding":
        return embedding_footprint(weight)
    outputs, inputs = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
    stack = _Stack(weight.steps, outputs, arithmetic)
    cost = arithmetic.conv if kind == "conv" else arithmetic.linear
    sizes = [(size, False) for size in stack.made()] + [(size, True) for size in stack.kept()]
    sizes += [(_bytes(tensor), True) for tensor in _others(weight)]
    turns = [turn for piece in weight.pieces for turn in piece.turns]
    before = _turned_before(weight, kind, arithmetic)
    if kind == "conv":
        stages = list(conv_stages(weight, stack.rank, cost, before))
    else:
        beside = [] if before else turns
        size = token_bytes(inputs, outputs, stack.rank, weight.steps, beside, cost)
        stages = [linear_stage(size, chunk_bytes(arithmetic.device, weight.steps, beside))]
    if before:
        added = stages if weight.steps or bias else []
        stages = list(turned_input_stages(weight.stored.shape[1], turns, arithmetic, cost, added))
    reads = _reads(weight)
    return Footprint(
        tuple(size for size, _ in sizes),
        sum(size for size, shared in sizes if shared),
        tuple(stages),
        stack.recast(cost) + _dense_blocks(weight.steps, cost),
        reads.peak,
        kept_bytes=sum(reads.kept.values()),
    )


def _turned_before(weight: EffectiveWeight, kind: Kind, arithmetic: Arithmetic) -> bool:
    """Whether the module is given its input turned, as `WeightBranch` decides."""
    by_patch = kind == "conv" and any(operator.mixes for operator, _ in all_turns(weight))
    wide = WideInput.of(weight.stored) is not None
    return not by_patch and not wide and turned_before(weight.pieces, arithmetic.dtype)


def _plain_form(site: Site, weight: EffectiveWeight, arithmetic: Arithmetic) -> PlainForm | None:
    """The form of the weight's branch where it is a plain stack, as `WeightBranch` and its forward decide."""
    if site.kind == "embedding" or not is_plain(weight.steps, weight.pieces):
        return None
    if getattr(site.module, "groups", 1) > 1 or WideInput.of(weight.stored) is not None:
        return None
    return arithmetic.plain_form(weight.steps, site.kind == "conv")


def plain_footprint(weight: EffectiveWeight, form: PlainForm, convolution: bool) -> Footprint:
    """A plain stack of a linear or conv weight."""
    outputs, inputs = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
    additions = low_rank(weight.steps)
    rank = sum(map(rank_of, additions))
    sizes = [form.down_bytes(rank, inputs), rank * FP32]
    sizes += [form.signs_bytes] if form.signed else []
    columns = 0
    shared = _kept_down(form, additions) * sizes[0]
    for block in up_blocks(weight.steps, outputs):
        numbers = [number for number, _, _ in block]
        block_rank = sum(rank_of(additions[number]) for number in numbers)
        rows = block[0][2] - block[0][1]
        sizes.append(form.up_bytes(block_rank, rows))
        shared += _kept_up(form, [additions[number] for number in numbers]) * sizes[-1]
        if not are_neighbours(numbers):
            sizes.append(INT64 * block_rank)
        columns = max(columns, form.columns_bytes(block_rank, rows))
    stages = plain_conv_stages(form, rank) if convolution else plain_stages(form, rank, inputs, columns)
    reads = _reads(weight)
    return Footprint(
        tuple(sizes),
        shared,
        stages=tuple(stages),
        attach_bytes=reads.peak,
        kept_bytes=sum(reads.kept.values()),
    )


def _kept_factors(weight: EffectiveWeight) -> int:
    """Bytes of the factors of one Kronecker product that are the file's own where they lie on the device."""
    (step,) = (step for step in weight.steps if isinstance(step, Add))
    term = step.term
    assert isinstance(term, Kronecker)
    own = [term.left] if term.left.dtype == torch.float32 else []
    own += [factor for factor in term.right if factor.dtype == torch.bfloat16]
    return sum(_bytes(factor) for factor in own if factor.is_contiguous())


def _kept_down(form: PlainForm, additions: Sequence[Add]) -> bool:
    """Whether down is the file's own where that lies on the device."""
    return len(additions) == 1 and not additions[0].columns and _is_as_stored(form, additions[0].term, "down")


def _kept_up(form: PlainForm, additions: Sequence[Add]) -> bool:
    """Whether the up of a range of rows is the file's own, as `_kept_down`."""
    return (
        len(additions) == 1
        and additions[0].row_change is None
        and _is_as_stored(form, additions[0].term, "up")
    )


def _is_as_stored(form: PlainForm, term: Term, side: str) -> bool:
    """Whether a factor is multiplied as it is: fp16 ones are brought to powers of two of their own."""
    factor = getattr(term, side)
    as_it_is = form.activations != torch.float16 and factor.dtype == form.activations
    return bool(as_it_is and factor.is_contiguous())


def _kronecker_form(site: Site, weight: EffectiveWeight, arithmetic: Arithmetic) -> KroneckerForm | None:
    """The form of a Kronecker product that is all that is added, as `WeightBranch` decides."""
    if site.kind != "linear" or WideInput.of(weight.stored) is not None or all_turns(weight):
        return None
    rows, columns = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
    term = single_kronecker(weight.steps, rows, columns)
    if term is None:
        return None
    return KroneckerForm.of(arithmetic.compute, arithmetic.device, arithmetic.dtype, term)


def kronecker_footprint(weight: EffectiveWeight, form: KroneckerForm) -> Footprint:
    """One Kronecker product beside a linear weight."""
    reads = _reads(weight)
    columns = form.columns_bytes()
    return Footprint(
        form.factor_sizes(),
        _kept_factors(weight),
        stages=((Use(form.token_bytes(), form.chunk_bytes), Use(columns, columns)),),
        attach_bytes=reads.peak,
        kept_bytes=sum(reads.kept.values()),
    )


def _reads(weight: EffectiveWeight) -> Reads:
    """What making the branch reads of the base."""
    return weight.reads if isinstance(weight, SketchedWeight) else Reads()


class _Stack:
    """The sizes of a stack of low-rank additions (`stack.build_stack`)."""

    def __init__(self, steps: Sequence[Add | Left], rows: int, arithmetic: Arithmetic) -> None:
        self.half = half = arithmetic.half
        self.widens = arithmetic.widens
        self.blocks = up_blocks(steps, rows)
        self.ups: list[tuple[int, torch.dtype, bool]] = []  # rows or columns, type, whether made anew
        self.downs: list[tuple[int, torch.dtype, bool]] = []
        self.ranks: list[int] = []
        for step in low_rank(steps):
            assert isinstance(step.term, LowRank)
            up_type = torch.float32 if step.row_change is not None else step.term.up.dtype
            down_type = torch.float32 if step.columns else step.term.down.dtype
            up_new = half or step.row_change is not None or not step.term.up.is_contiguous()
            down_new = half or bool(step.columns)
            self.ranks.append(step.term.rank)
            self.ups.append((step.stop - step.start, torch.float16 if half else up_type, up_new))
            self.downs.append((step.term.down.shape[1], torch.float16 if half else down_type, down_new))
        self.rank = sum(self.ranks)

    def made(self) -> Iterator[int]:
        """Tensors that are made for the device in any case."""
        if self.rank:
            yield from (self.rank * FP32, self.rank * FP32)  # exponents and scales
        if len(self.ranks) > 1:
            yield self.rank * self.downs[0][0] * _element_bytes(self.downs)
        for block in self.blocks:
            numbers = [number for number, _, _ in block]
            if not are_neighbours(numbers):
                yield INT64 * sum(self.ranks[number] for number in numbers)
        yield from (size for size, new in self._ups() if new)
        yield from (size for size, new in self._single_down() if new)

    def kept(self) -> Iterator[int]:
        """Tensors that are the file's own, where they lie on the device already."""
        yield from (size for size, new in (*self._ups(), *self._single_down()) if not new)

    def _ups(self) -> Iterator[tuple[int, bool]]:
        """Each block of ups, in the widest type of its parts, and whether it is made anew."""
        for block in self.blocks:
            _, start, stop = block[0]
            parts = [self.ups[number] for number, _, _ in block]
            rank = sum(self.ranks[number] for number, _, _ in block)
            new = len(block) > 1 or parts[0][2]
            yield (stop - start) * rank * _element_bytes(parts), new

    def _single_down(self) -> Iterator[tuple[int, bool]]:
        if len(self.ranks) == 1:
            columns, dtype, new = self.downs[0]
            yield columns * self.rank * dtype.itemsize, new

    def recast(self, cost: ProductCost) -> int:
        """fp32 copies of the factors while they are multiplied, or their parts: of one side at a time."""
        if self.half and not self.widens:
            return 0
        return max((self._recast(side, cost.strict.inner) for side in (self.ups, self.downs)), default=0)

    def _recast(self, side: Sequence[tuple[int, torch.dtype, bool]], parts: float) -> int:
        """parts: copies of an fp32 operand; one of fp16 or bf16 is a single part."""
        if not side:
            return 0
        copies = parts if _element_bytes(side) == FP32 else 1.0
        return int(FP32 * copies * sum(rank * each[0] for rank, each in zip(self.ranks, side, strict=True)))


def _element_bytes(parts: Sequence[tuple[int, torch.dtype, bool]]) -> int:
    """Of the type of factors side by side: fp16 beside bf16 makes fp32."""
    return functools.reduce(torch.promote_types, (dtype for _, dtype, _ in parts)).itemsize


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
    """What `Operator.to` brings along: of a permuted rotation its orders too."""
    if isinstance(operator, Chain):
        for part in operator.parts:
            yield from _operator_tensors(part)
        return
    yield from operator.tensors()
    if isinstance(operator, Blocks):
        yield from (order for order in (operator.order, operator.inverse) if order is not None)


def _dense_blocks(steps: Sequence[Add | Left], cost: ProductCost) -> int:
    """The block of a dense or Hadamard term that is at hand: its source, its fp32 copies, and their parts."""
    largest_block, inner = 0.0, cost.strict.inner
    for step in whole_terms(steps):
        if isinstance(step.term, Kronecker):
            continue
        block = min(DENSE_BLOCK_BYTES, FP32 * math.prod(step.term.size))
        made = max(1.5, 1.0 + inner) if isinstance(step.term, Dense) else 3.0
        made += 3.0 if step.columns else 0.0
        widened = FP32 * step.term.b1.numel() if isinstance(step.term, Hadamard) else 0
        if isinstance(step.term, Sparse):  # where each value goes, and the value, in wider types
            widened = 3 * FP32 * step.term.value.numel()
        largest_block = max(largest_block, made * block + (2.0 + inner) * widened)
    return int(largest_block)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
