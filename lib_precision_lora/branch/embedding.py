"""The branch of an embedding: `y += (scale · up[ids]) · down + Σ D[ids]`."""

from __future__ import annotations

from torch import Tensor, nn

from lib_precision_lora.branch.operands import WeightBranch
from lib_precision_lora.branch.product import SingleProduct


class EmbeddingBranch(WeightBranch):
    """Runs on the ids and the vectors of an embedding. Rows of its weight are looked up, not multiplied,
    so there is nothing to gain from fp16 products: it computes in fp32 in every mode."""

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)` in y's memory; x: [...] ids, y: [..., dim]."""
        operands = self.operands(y)
        flat_ids, y = x.reshape(-1).to(y.device), y.contiguous()
        vectors = y.view(-1, y.shape[-1])
        for index, segment in enumerate(operands.segments):
            inside = ((flat_ids >= segment.start) & (flat_ids < segment.stop)).nonzero().flatten()
            rows = flat_ids[inside] - segment.start
            vector = vectors[inside].float() * (1.0 + segment.left)
            up = operands.stack.ups[index] if operands.stack is not None else None
            if up is not None and operands.stack is not None:
                hidden = up.up[rows].float() * operands.scale[up.columns]
                down = operands.stack.down[up.columns].float()
                vector = vector + SingleProduct()(_times, hidden, down, (-1,))
            for dense in segment.dense:
                chosen = dense.value[dense.first + rows.to(dense.value.device)]
                vector = vector + dense.scale * chosen.to(vector)
            vectors[inside] = vector.to(vectors.dtype)
        return y


def _times(x: Tensor, w: Tensor) -> Tensor:
    return x @ w
