"""The branch of a linear module: `y += (x · downᵀ · diag(scale)) · upᵀ + x · Dᵀ + b`, in token chunks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import linear

from lib_precision_lora.branch.operands import WeightBranch
from lib_precision_lora.branch.product import SingleProduct
from lib_precision_lora.branch.rows import WORKSPACE_BYTES, add_rows


class LinearBranch(WeightBranch):
    """Runs on the input and the output of a module whose forward multiplies by a [out, in] weight."""

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)`, in y's memory where y is contiguous; x: [..., in], y: [..., out]."""
        operands = self.operands(x)
        bias: Tensor | None = getattr(module, "bias", None)
        y = y.contiguous()
        rank = 0 if operands.stack is None else operands.stack.down.shape[0]
        tokens = max(1, WORKSPACE_BYTES // (4 * (2 * x.shape[-1] + 2 * y.shape[-1] + 3 * rank)))
        for x_chunk, y_chunk in token_chunks(x, y, tokens):
            hidden = None
            if operands.stack is not None:
                hidden = operands.product(linear, x_chunk, operands.stack.down, (-1,)) * operands.scale

            def through_dense(rows: Tensor, x_chunk: Tensor = x_chunk) -> Tensor:
                return SingleProduct()(linear, x_chunk, rows, (-1,))

            add_rows(operands, hidden, y_chunk, bias, through_dense)
        return y


def token_chunks(x: Tensor, y: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching chunks [≤ tokens, in] of x and [≤ tokens, out] of y; views of both, whatever x's strides."""
    if x.is_contiguous():
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if x.ndim == 1:
        x, y = x[None], y[None]
    if x.ndim == 2:
        for start in range(0, x.shape[0], tokens):
            yield x[start : start + tokens], y[start : start + tokens]
        return
    for index in range(x.shape[0]):
        yield from token_chunks(x[index], y[index], tokens)
