"""The branch of a convolution: `y += up · (scale · conv(x, down)) + conv(x, D) + b`, sample by sample.

Where inputs are rotated among positions of the kernel, `patches.PatchInput` stands in for the input side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.adapters.operators import Chain, Diagonal, Operator, Uniform
from lib_precision_lora.adapters.steps import Add, Left, Turn
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.arithmetic.plain import PlainStack
from lib_precision_lora.branch.arithmetic.plain_form import PLAIN_HIDDEN_BYTES
from lib_precision_lora.branch.arithmetic.plain_kronecker import PlainKronecker
from lib_precision_lora.branch.arithmetic.product import Compute, Product, SingleProduct
from lib_precision_lora.branch.forward.linear import enlargement, mix_left, turn
from lib_precision_lora.branch.forward.operands import Operands
from lib_precision_lora.branch.forward.patches import PatchInput
from lib_precision_lora.branch.forward.rows import add_rows
from lib_precision_lora.branch.forward.turned_input import InputTurns
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.forward.wide_input import WideInput
from lib_precision_lora.memory.chunks import WORKSPACE_BYTES, token_count

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class ConvBranch(WeightBranch):
    """Runs on the input and the output of a Conv1d, Conv2d or Conv3d.

    Stride, padding, its mode, and dilation are read from the module at each call, since hosts change them
    (seamless tiling makes padding circular).
    """

    convolution = True

    def __init__(self, weight: EffectiveWeight, bias: EffectiveWeight | None, compute: Compute) -> None:
        super().__init__(weight, bias, compute)
        self._by_patch = any(operator.mixes for operator, _ in input_turns(weight))
        self.can_turn = not self._by_patch
        self._spatial = len(weight.stored.shape) - 2

    def __call__(self, module: Conv, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)`, in y's memory where its layout allows; x: [B, in, …] or [in, …], y alike."""
        operands = self.operands(x, y if module.groups == 1 else None)
        assert not isinstance(operands, PlainKronecker)  # `adds_kronecker`
        if isinstance(operands, Operands) and operands.is_empty:
            return y
        spatial = len(module.kernel_size)
        y = y if _positions_are_flat(y, spatial) else y.contiguous()
        if isinstance(operands, PlainStack):
            add_plain(module, operands, *((x, y) if x.ndim > spatial + 1 else (x[None], y[None])))
            return y
        if x.ndim == spatial + 1:
            self._add(module, operands, x, y)
        else:
            for index in range(x.shape[0]):
                self._add(module, operands, x[index], y[index])
        return y

    def _turn(self, before: InputTurns, x: Tensor) -> Tensor:
        turns = tuple((channelwise(operator, self.channels), factor) for operator, factor in before.turns)
        x = x if _positions_are_flat(x, self._spatial) else x.contiguous()
        return dataclasses.replace(before, turns=turns).apply(x.flatten(-self._spatial), -2).view(x.shape)

    def _add(self, module: Conv, operands: Operands, x: Tensor, y: Tensor) -> None:
        """One sample, in place; x: [in, …], y: [out, …]."""
        x = x if self.wide_input is None else self.wide_input.completed(x)
        positions = y.view(y.shape[0], -1).T
        width, height = x.shape[0] // module.groups, y.shape[0] // module.groups
        whole = self._by_patch or operands.has_whole_terms
        at_once = positions.shape[0] if whole else token_count(operands.token_bytes)
        for group in range(module.groups):
            channels = slice(group * width, (group + 1) * width)
            given = ConvInput(module, operands, x, channels, self.wide_input)
            window = (group * height, (group + 1) * height)
            if self._by_patch:
                add_rows(operands, PatchInput(module, operands, x, given), positions, module.bias, window)
                continue
            for start in range(0, positions.shape[0], at_once):
                given.window = slice(start, start + at_once)
                add_rows(operands, given, positions[given.window], module.bias, window)


class ConvInput:
    """One sample, [in, …], of which `channels` is the group at hand (`rows.BranchInput`).

    window: the positions that are asked for; what a convolution makes for all of them is made once.
    """

    def __init__(
        self, module: Conv, operands: Operands, x: Tensor, channels: slice, wide: WideInput | None
    ) -> None:
        self.module, self.operands, self.wide = module, operands, wide
        self.sample, self.x = x, x[channels]
        self.window = slice(None)
        self._hidden: Tensor | None = None
        self._base: dict[int, tuple[Tensor, Tensor]] = {}

    def hidden(self) -> Tensor | None:
        if self._hidden is None:
            self._hidden = self._whole_hidden()
        return None if self._hidden is None else self._hidden[self.window]

    def base(self, turns: Sequence[Turn]) -> Tensor:
        if id(turns) not in self._base:
            shift = self._turn(turns)
            size = enlargement(shift, tuple(range(shift.ndim)))
            enlarged = (shift * size).to(self.sample.dtype)
            enlarged = enlarged if self.wide is None else self.wide.own_part(enlarged)
            self._base[id(turns)] = positions(self.module.forward(enlarged[None])), size.flatten()
        made, size = self._base[id(turns)]
        y = made[self.window].to(torch.float32, copy=True)
        return (y if self.module.bias is None else y.sub_(self.module.bias.to(y))).div_(size)

    def _whole_hidden(self) -> Tensor | None:
        down, scale = self.operands.down, self.operands.scale
        if down is None or scale is None:
            return None
        kernels = down.view(-1, self.x.shape[0], *self.module.kernel_size)
        return positions(convolve(self.module, self.operands.product, self.x[None], kernels)).mul_(scale)

    def dense(self, rows: Tensor, turns: Sequence[Turn]) -> Tensor:
        weight = rows.to(self.x.device).view(-1, self.x.shape[0], *self.module.kernel_size)
        return positions(convolve(self.module, SingleProduct(), self._turned(turns)[None], weight))

    def kronecker(self, term: Kronecker, turns: Sequence[Turn]) -> Tensor:
        """The b slices of the input channels run as a batch, then `left` mixes them."""
        *outer, kernel = term.right
        slices = self._turned(turns).reshape(term.left.shape[1], -1, *self.x.shape[1:])
        weight = kernel.reshape(kernel.shape[0], slices.shape[1], *self.module.kernel_size)
        inner = convolve(self.module, SingleProduct(), slices, weight).flatten(2).permute(2, 0, 1)
        for factor in outer:
            inner = SingleProduct()(functional.linear, inner, factor, (-1,))
        return mix_left(term, inner)

    def _turn(self, turns: Sequence[Turn]) -> Tensor:
        by_channel = [(channelwise(operator, self.x.shape[0]), factor) for operator, factor in turns]
        return turn(self.x.float().movedim(0, -1), by_channel).movedim(-1, 0)

    def _turned(self, turns: Sequence[Turn]) -> Tensor:
        return self.x.float() + self._turn(turns) if turns else self.x


def require_conv_form(module: nn.Module, weight: EffectiveWeight) -> None:
    """Raise `AdapterError` for what has no branch on a convolution.

    Rotated outputs of a grouped convolution mix groups, and its inputs are turned for one group alone.
    """
    rotated = any(isinstance(step, Left) and step.operator.mixes for step in weight.steps)
    if (rotated or input_turns(weight)) and getattr(module, "groups", 1) > 1:
        raise AdapterError("rotated outputs or turned inputs of a grouped convolution are not supported")


def input_turns(weight: EffectiveWeight) -> list[Turn]:
    """Every turn of inputs in a weight, of the base and of what is added to it."""
    turns = [turn for piece in weight.pieces for turn in piece.turns]
    return turns + [turn for step in weight.steps if isinstance(step, Add) for turn in step.columns]


def channelwise(operator: Operator, channels: int) -> Operator:
    """A scale of columns [in · kernel] as one of channels [in]."""
    if isinstance(operator, Diagonal):
        return Diagonal(operator.values.view(channels, -1)[:, 0])
    if isinstance(operator, Chain):
        return Chain(tuple(channelwise(part, channels) for part in operator.parts))
    assert isinstance(operator, Uniform)
    return operator


def positions(y: Tensor) -> Tensor:
    """One sample's outputs by position: [1, n, …] → [positions, n]."""
    return y[0].flatten(1).T


def convolve(module: Conv, product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """`conv(x, weight)` in fp32, without bias, as the module would; input channels in bounded blocks.

    x: [B, in, …] of one group; weight: [n, in, *kernel]; returns [B, n, …].
    """
    channels = max(1, WORKSPACE_BYTES // (8 * max(1, x[:, 0].numel())))
    result: Tensor | None = None
    for start in range(0, x.shape[1], channels):
        part = slice(start, start + channels)
        result = _add_block(result, _convolved_block(module, product, x[:, part], weight[:, part]))
    assert result is not None
    return result


def add_plain(module: Conv, stack: PlainStack, x: Tensor, y: Tensor) -> None:
    """`y += branch(x)` in place; x: [B, in, …], y: [B, out, …] with positions that are one axis."""
    kernels = stack.down.view(stack.rank, x.shape[1], *module.kernel_size)
    sample_bytes = stack.form.hidden_bytes(stack.rank) * y[0, 0].numel()
    at_once = max(1, PLAIN_HIDDEN_BYTES // max(1, sample_bytes))
    for start in range(0, x.shape[0], at_once):
        hidden = _as_the_module(module, x[start : start + at_once], kernels)
        parts = hidden.mul_(stack.scale.view(-1, *[1] * len(module.kernel_size))).flatten(2)
        for here in stack.ranges:
            rows = positions_of(y[start : start + at_once, here.start : here.stop])
            up = stack.up(here).expand(len(rows), -1, -1)
            rows.baddbmm_(up, parts[:, here.columns], alpha=stack.factor)


def _convolved_block(module: Conv, product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """What a block of input channels gives. Nothing else of it is alive when the next one is made."""
    return product(partial(_as_the_module, module), x, weight, tuple(range(1, x.ndim)))


def _as_the_module(module: Conv, x: Tensor, weight: Tensor) -> Tensor:
    """`conv(x, weight)` with the module's stride, padding and dilation, and without bias."""
    padding: str | tuple[int, ...] = module.padding
    if module.padding_mode != "zeros":
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = (0,) * len(module.kernel_size)
    return _CONVOLVE[len(module.kernel_size)](x, weight, None, module.stride, padding, module.dilation)


def _add_block(total: Tensor | None, block: Tensor) -> Tensor:
    return block if total is None else total.add_(block)


def positions_of(y: Tensor) -> Tensor:
    """[B, n, …] seen as [B, n, positions]."""
    return y.view(*y.shape[:2], -1)


def _positions_are_flat(y: Tensor, spatial: int) -> bool:
    """Whether each sample's positions can be viewed as one axis."""
    sizes, strides = y.shape[-spatial:], y.stride()[-spatial:]
    return all(strides[axis] == strides[axis + 1] * sizes[axis + 1] for axis in range(spatial - 1))
