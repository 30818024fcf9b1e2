"""Rotations of outputs (LyCORIS) and of inputs (PEFT, OneTrainer, sd-scripts), with their float64 oracles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.family import Family, Shape, normal


def cayley(blocks: Tensor, constraint: float) -> Tensor:
    """`(I + Q)(I − Q)⁻¹` with Q = blocks − blocksᵀ, its norm at most the constraint where there is one."""
    skew = (blocks - blocks.transpose(-1, -2)).double()
    if constraint:
        skew = skew * min(1.0, constraint / (float(skew.norm()) + 1e-8))
    identity = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def block_size(rows: int) -> int:
    return next(n for n in (4, 2, 1) if rows % n == 0)


def oft(constrained: bool, rescaled: bool, shape: Shape, g: torch.Generator) -> Family:
    """`W'[k, m] = Σₙ R[k][n, m] W[k, n]`, then rows are multiplied with `rescale`."""
    size = block_size(shape[0])
    blocks = normal(g, 0.1, shape[0] // size, size, size)
    alpha = 0.1 / shape[0] if constrained else 0.0
    turns = cayley(blocks, alpha * shape[0])
    rescale = (1.0 + normal(g, 0.05, shape[0])).view(shape[0], *(1 for _ in shape[1:]))
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(alpha, dtype=torch.float64)}

    def full(weight: Tensor) -> Tensor:
        turned = torch.einsum("knm,knc->kmc", turns, weight.reshape(*blocks.shape[:2], -1)).reshape(shape)
        return turned * rescale.double() if rescaled else turned

    return Family(tensors | ({"rescale": rescale} if rescaled else {}), full)


def boft(rescaled: bool, shape: Shape, g: torch.Generator) -> Family:
    """`W' = Bₘ … B₁ W`: stage i turns groups of rows whose numbers lie 2^i · b / 2 apart."""
    size = block_size(shape[0])
    count = shape[0] // size
    stages = max(1, (count & -count).bit_length()) if size > 1 else 1
    blocks = normal(g, 0.1, stages, count, size, size)
    turns = cayley(blocks, 0.0)
    rescale = (1.0 + normal(g, 0.05, shape[0])).view(shape[0], *(1 for _ in shape[1:]))

    def full(weight: Tensor) -> Tensor:
        rows = weight.reshape(shape[0], -1)
        for stage in range(stages):
            step = 2**stage * (size // 2)
            order = [
                base + half * step + i
                for base in range(0, shape[0], 2 * step)
                for i in range(step)
                for half in (0, 1)
            ]
            turned = torch.empty_like(rows)
            turned[order] = (turns[stage] @ rows[order].view(count, size, -1)).reshape(shape[0], -1)
            rows = turned
        return rows.reshape(shape) * (rescale.double() if rescaled else 1.0)

    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0)}
    return Family(tensors | ({"rescale": rescale} if rescaled else {}), full)


def input_oft(shared: bool, shape: Shape, g: torch.Generator) -> Family:
    """`W' = W · Rᵀ` on a linear layer, W · R on a convolution; `R = I + 2Q + 2Q² + 2Q³ + Q⁴`.

    The strict upper triangles of Q are stored, row by row; a shared one serves all blocks of [in · kernel].
    """
    columns = math.prod(shape[1:])
    size = block_size(columns)
    stored = 1 if shared else columns // size
    packed = normal(g, 0.1, stored, size * (size - 1) // 2)
    whole = torch.zeros(columns, columns, dtype=torch.float64)
    for block in range(columns // size):
        values = iter(packed[0 if shared else block].tolist())
        for row in range(size):
            for column in range(row + 1, size):
                value = next(values)
                whole[block * size + row, block * size + column] = value
                whole[block * size + column, block * size + row] = -value
    powers = [torch.linalg.matrix_power(whole, n) for n in range(5)]
    turn = powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4]
    if len(shape) == 2:
        turn = turn.T
    return Family({"oft_R.weight": packed}, lambda weight: (weight.flatten(1) @ turn).reshape(shape))


def input_boft(shape: Shape, g: torch.Generator) -> Family:
    """`W' = diag(s) · W · (Mₖ · … · M₀)ᵀ`, Mᵢ block-diagonal between a permutation and its inverse.

    Stage i takes the chunks of b / 2 inputs of 2ⁱ blocks in the order 0, 2, 4, …, 1, 3, 5, …
    """
    columns = math.prod(shape[1:])
    size = block_size(columns)
    count = columns // size
    stages = (count & -count).bit_length() if size > 1 else 1
    blocks = normal(g, 0.2, stages, count, size, size)
    scale = 1.0 + normal(g, 0.05, shape[0])
    skew = 0.5 * (blocks - blocks.transpose(-1, -2)).double()
    identity = torch.eye(size, dtype=torch.float64)
    turns = (identity - skew) @ torch.linalg.inv(identity + skew)
    product = torch.eye(columns, dtype=torch.float64)
    for stage in range(stages):
        group, chunk = size * 2**stage, max(1, size // 2)
        permutation = torch.zeros(columns, columns, dtype=torch.float64)
        place = 0
        for first in range(0, columns, group):
            chunks = list(range(first, first + group, chunk))
            for start in chunks[0::2] + chunks[1::2] if stage else chunks:
                for offset in range(chunk):
                    permutation[place, start + offset] = 1.0
                    place += 1
        product = permutation @ torch.block_diag(*turns[stage]) @ permutation.T @ product
    tensors = {"boft_R": blocks, "boft_s": scale[:, None] if len(shape) == 2 else scale[None]}

    def full(weight: Tensor) -> Tensor:
        return (scale.double()[:, None] * weight.flatten(1) @ product.T).reshape(shape)

    return Family(tensors, full)
