"""The branch of an embedding: rows of the effective weight, looked up by id instead of multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters.adapter import AdapterError
from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.branch.algebra.effective import EffectiveWeight, Piece
from lib_precision_lora.branch.arithmetic.product import Compute
from lib_precision_lora.branch.forward.weight_branch import WeightBranch


class EmbeddingBranch(WeightBranch):
    """Runs on the ids and the vectors of an embedding, in fp64 in every mode, on the files' own factors,
    where they are."""

    placeable = False

    def __init__(self, weight: EffectiveWeight, bias: EffectiveWeight | None, compute: Compute) -> None:
        if any(isinstance(step, Left) and step.operator.mixes for step in weight.steps):
            raise AdapterError("a rotation of the vocabulary of an embedding is not supported")
        super().__init__(weight, bias, compute)

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)` in y's memory; x: [...] ids, y: [..., dim]."""
        ids, y = x.reshape(-1).to(y.device), y.contiguous()
        vectors = y.view(-1, y.shape[-1]).to(_exact_type(y.device))
        stored = vectors.clone() if len(self.pieces) > 1 else vectors
        for piece in self.pieces:
            inside = (ids >= piece.start) & (ids < piece.stop)
            vectors[inside] += _shift(piece, stored[inside], ids[inside])
        for step in self.steps:
            inside = (ids >= step.start) & (ids < step.stop)
            rows = (ids[inside] - step.start).cpu()
            if isinstance(step, Add):
                vectors[inside] += _added(step, rows).to(vectors)
            else:
                every_row = step.operator.deviation(torch.ones(step.stop - step.start))
                vectors[inside] *= 1.0 + step.factor * every_row[rows, None].to(vectors)
        y.view(-1, y.shape[-1]).copy_(vectors)
        return y


def _exact_type(device: torch.device) -> torch.dtype:
    """fp64 where there is any, so that several additions still meet the vector in one rounding."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _shift(piece: Piece, stored: Tensor, ids: Tensor) -> Tensor:
    """What the turns of a piece add to the stored vectors of these ids: [ids, dim]."""
    total = torch.zeros_like(stored)
    for operator, factor in piece.turns:
        total = total + factor * operator.to(stored.device).transposed(stored + total)
    if piece.share is not None:
        total = total * piece.share.to(total)[ids - piece.start, None]
    return total


def _added(step: Add, rows: Tensor) -> Tensor:
    """What a step adds to these of its rows: [rows, dim] fp32, on the factors' device."""
    device = step.term.tensors()[0].device
    added = step.term.rows((step.first + rows).to(device), _exact_type(device))
    if step.row_change is not None:
        added = added * (1.0 + step.row_change[rows, None].to(added))
    for operator, factor in step.columns:
        added = added + factor * operator.to(device).transposed(added)
    return step.scale * added
