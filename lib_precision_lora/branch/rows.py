"""The output side of a branch, shared by linear and convolutional modules: rows are output channels.

    y[:, s] += hidden[:, columns] · upᵀ + x * D[s] + b[s]
    y[:, s]  = (y[:, s] − bias) · (1 + dL) + bias + the same, where dL ≠ 0

All parts are summed in fp32 and meet y in one rounding, block by block in y's own memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from lib_precision_lora.adapters.terms import Segment
from lib_precision_lora.branch.operands import Operands

WORKSPACE_BYTES = 32 * 2**20
"""What the fp32 copies of one block of an activation may take together."""

DENSE_BLOCK_BYTES = 8 * 2**20
"""Largest block of a dense remainder that is brought to fp32 at a time."""


def add_rows(
    operands: Operands,
    hidden: Tensor | None,
    y: Tensor,
    bias: Tensor | None,
    dense_product: Callable[[Tensor], Tensor],
    window: tuple[int, int] | None = None,
) -> None:
    """The branch on one block of tokens, in place.

    hidden: [tokens, total rank] fp32; y: [tokens, out], any strides; bias: [out], the module's own;
    dense_product: rows of D, [rows, …] fp32 → their output, [tokens, rows] fp32;
    window: the output rows to treat (one group of a grouped convolution), all where None.
    """
    window = window or (0, y.shape[1])
    for index, segment in enumerate(operands.segments):
        up = operands.stack.ups[index] if operands.stack is not None else None
        if up is None and not segment.dense and segment.left == 0.0 and operands.bias is None:
            continue
        inner = hidden[:, up.columns] if up is not None and hidden is not None else None
        for start, stop in _blocks(segment, y.shape[0], window):
            delta = _dense_delta(segment, start, stop, y.device, dense_product)
            if inner is not None and up is not None:
                delta = delta + operands.product(linear, inner, up.up[start:stop], (-1,))
            rows = slice(segment.start + start, segment.start + stop)
            if operands.bias is not None:
                delta = delta + operands.bias[rows]
            _add(y[:, rows], delta, segment.left, None if bias is None else bias[rows])


def accumulate(y: Tensor, delta: Tensor | float) -> None:
    """`y += delta` with an fp32 sum and one rounding, in place.

    CPU and CUDA add across types in one pass; other backends are not sure to, and take the long way.
    """
    if y.device.type in ("cpu", "cuda") or y.dtype == torch.float32:
        y.add_(delta)
    else:
        y.copy_(y.float() + delta)


def _add(y: Tensor, delta: Tensor | float, left: float, bias: Tensor | None) -> None:
    if left == 0.0:
        accumulate(y, delta)
        return
    offset = 0.0 if bias is None else bias.to(device=y.device, dtype=torch.float32)
    y.copy_((y.float() - offset) * (1.0 + left) + offset + delta)


def _dense_delta(
    segment: Segment, start: int, stop: int, device: torch.device, dense_product: Callable[[Tensor], Tensor]
) -> Tensor | float:
    """`x * Σ scale · D[start:stop]`, or 0 without a dense remainder."""
    delta: Tensor | float = 0.0
    for dense in segment.dense:
        rows = dense.value[dense.first + start : dense.first + stop].to(device).float()
        delta = delta + dense.scale * dense_product(rows)
    return delta


def _blocks(segment: Segment, tokens: int, window: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Row ranges of the segment, within the window, whose output and part of D keep within their bounds."""
    height = WORKSPACE_BYTES // (8 * max(1, tokens))
    for dense in segment.dense:
        height = min(height, DENSE_BLOCK_BYTES // (4 * max(1, dense.value[0].numel())))
    first = max(segment.start, window[0]) - segment.start
    last = min(segment.stop, window[1]) - segment.start
    for start in range(first, last, max(1, height)):
        yield start, min(start + max(1, height), last)
