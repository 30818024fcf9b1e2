"""The input side of a convolution whose inputs are rotated together with the positions of the kernel.

A patch is what the kernel sees at one position of the output: [in · kernel]. On patches a convolution is a
linear layer, and a rotation of its inputs a rotation of its patches:

    W0 (R − I) p        the module's own forward, of images of one patch each: p has the kernel's size

Only a block of patches exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_precision_lora.adapters.steps import Turn
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.forward.linear import LinearInput, enlargement, turn
from lib_precision_lora.branch.forward.operands import Operands
from lib_precision_lora.branch.forward.rows import BranchInput
from lib_precision_lora.memory.chunks import WORKSPACE_BYTES

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class PatchInput:
    """One sample, [in, …] (`rows.BranchInput`). unturned: the input side of what no turn concerns."""

    def __init__(self, module: Conv, operands: Operands, sample: Tensor, unturned: BranchInput) -> None:
        self.module, self.operands, self.sample, self.unturned = module, operands, sample, unturned

    def hidden(self) -> Tensor | None:
        """The turns of low-rank terms stand in their factors."""
        return self.unturned.hidden()

    def dense(self, rows: Tensor, turns: Sequence[Turn]) -> Tensor:
        """The rows are turned instead of the patches, of which there are more."""
        rows = rows.to(self.sample.device).flatten(1)
        for operator, factor in turns:
            rows = rows + factor * operator.transposed(rows)
        return self.unturned.dense(rows, ())

    def kronecker(self, term: Kronecker, turns: Sequence[Turn]) -> Tensor:
        if not turns:
            return self.unturned.kronecker(term, turns)
        return self._by_block(
            lambda block: LinearInput(self.module, self.operands, block, None).kronecker(term, turns)
        )

    def base(self, turns: Sequence[Turn]) -> Tensor:
        by_patch = patchwise(self.module)
        size = self.sample.shape[0], *self.module.kernel_size

        def product(block: Tensor) -> Tensor:
            shift = turn(block, turns)
            scale = enlargement(shift, (-1,))
            enlarged = (shift * scale).to(self.sample.dtype).view(-1, *size)
            y: Tensor = type(self.module).forward(by_patch, enlarged).float().flatten(1)
            return (y if self.module.bias is None else y.sub_(self.module.bias.to(y))).div_(scale)

        return self._by_block(product)

    def _by_block(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The product of all patches: [positions, n]; of blocks [≤ positions, in · kernel] fp32."""
        return torch.cat(list(map(product, patch_blocks(self.module, self.sample))))


def patchwise(module: Conv) -> Any:
    """The module as it multiplies single patches: no padding, no dilation, its parameters the same objects.

    It is another object for the time of one forward, since the module's own numbers are not ours to change.
    """
    twin = object.__new__(type(module))
    flat = {"padding": (0,), "dilation": (1,), "stride": (1,)}
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({name: value * len(module.kernel_size) for name, value in flat.items()})
    twin.__dict__["padding_mode"] = "zeros"
    return twin


def patch_blocks(module: Conv, x: Tensor) -> Iterator[Tensor]:
    """What the kernel sees, position by position: blocks of [positions, in · kernel] fp32; x: [in, …]."""
    constant = module.padding_mode == "zeros"
    pads = module._reversed_padding_repeated_twice
    if constant and not isinstance(module.padding, str):
        pads = [pad for pad in reversed(module.padding) for _ in range(2)]
    seen = functional.pad(x[None], pads, mode="constant" if constant else module.padding_mode)[0]
    geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(geometry, start=1):
        seen = seen.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    seen = seen.movedim(0, len(module.kernel_size))
    columns = x.shape[0] * math.prod(module.kernel_size)
    row_bytes = 16 * columns * math.prod(seen.shape[1 : len(module.kernel_size)])
    height = max(1, WORKSPACE_BYTES // row_bytes)
    for start in range(0, seen.shape[0], height):
        yield seen[start : start + height].reshape(-1, columns).float()
