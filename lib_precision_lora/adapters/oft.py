"""OFT and BOFT as LyCORIS trains them: rotations of the outputs, block by block (`peft_oft`: of the inputs).

    Q = blocks − blocksᵀ        R = (I + Q) · (I − Q)⁻¹ = I + 2 Q (I − Q)⁻¹        (Cayley)
    OFT    W'[k, m] = Σₙ R[k][n, m] · W[k, n]                     k the block
    BOFT   W' = Bₘ · … · B₁ · W, each Bᵢ block-diagonal after a butterfly permutation
    W' is multiplied with `rescale` by rows, where the file has it.

Source: arXiv 2306.07280 (OFT), 2311.06243 (BOFT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import read_alpha
from lib_precision_lora.adapters.cayley import cayley_deviation
from lib_precision_lora.adapters.operators import Blocks, Chain, Diagonal, Operator
from lib_precision_lora.adapters.steps import Left, Running, Step


@dataclass(frozen=True, slots=True, eq=False)
class OFT:
    """operator: the rotation (and rescale) of [out]; block: the size of its blocks.

    rows: out, None for any multiple of a shared block.
    """

    operator: Operator
    rows: int | None
    block: int
    kind: str

    @property
    def rank(self) -> int:
        return self.block

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def check(self, shape: tuple[int, ...]) -> None:
        if self.rows is None and shape[0] % self.block:
            raise AdapterError(
                f"the shared {self.kind} block of {self.block} does not divide the layer's {shape[0]} "
                "outputs: the file was trained on another model"
            )
        if self.rows not in (None, shape[0]):
            raise AdapterError(
                f"the {self.kind} blocks of {self.block} make {self.rows} outputs, the layer has {shape[0]}: "
                "the file was trained on another model"
            )

    def reordered(self, order: Tensor) -> OFT:
        raise AdapterError(f"{self.kind} on a layer whose rows the host reorders is not supported")

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return (Left(0, running.shape[0], self.operator, strength),)


def read_oft(name: str, tensors: Mapping[str, Tensor]) -> OFT | None:
    """The OFT or BOFT among a layer's tensors, by role; None where there is none.

    oft_blocks: [count, b, b] (OFT) or [stages, count, b, b] (BOFT); alpha: the constraint, relative to
    out; rescale: [out, 1, …]. Raises `AdapterError`: another shape, NaN, inf.
    """
    if "oft_blocks" not in tensors:
        return None
    blocks = as_float_factor(name, "oft_blocks", tensors["oft_blocks"])
    require_finite(name, oft_blocks=blocks, rescale=tensors.get("rescale"))
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise AdapterError(
            f"{name}: oft_blocks has shape {list(blocks.shape)}, not [count, b, b] of square blocks"
        )
    count, size = blocks.shape[-3], blocks.shape[-1]
    rows = count * size
    if blocks.ndim == 4 and (size % 2 or rows % (2 ** (blocks.shape[0] - 1) * size)):
        raise AdapterError(
            f"{name}: oft_blocks has shape {list(blocks.shape)}: {blocks.shape[0]} butterfly stages of "
            f"blocks of {size} do not divide {rows} outputs"
        )
    constraint = (read_alpha(name, tensors) or 0.0) * rows
    turns = cayley_deviation(constrained_skew(blocks.double(), constraint))
    parts: list[Operator] = []
    if blocks.ndim == 3:
        parts.append(Blocks(turns.transpose(-1, -2).float().contiguous()))
    else:
        for stage in range(blocks.shape[0]):
            order = butterfly_order(rows, 2**stage * (size // 2))
            parts.append(Blocks(turns[stage].float(), order, order.argsort()))
    if "rescale" in tensors:
        rescale = tensors["rescale"].flatten()
        if rescale.numel() != rows:
            raise AdapterError(
                f"{name}: rescale has {rescale.numel()} values, the blocks make {rows} outputs"
            )
        parts.append(Diagonal((rescale.double() - 1.0).float()))
    operator = parts[0] if len(parts) == 1 else Chain(tuple(parts))
    return OFT(operator, rows, size, "oft" if blocks.ndim == 3 else "boft")


def constrained_skew(blocks: Tensor, constraint: float) -> Tensor:
    """`Q = blocks − blocksᵀ`, its norm over all blocks held to the constraint where that is positive.

    blocks: [..., b, b] fp64.
    """
    skew = blocks - blocks.transpose(-1, -2)
    if constraint > 0:
        norm = skew.norm() + 1e-8
        if norm > constraint:
            skew = skew * constraint / norm
    return skew


def butterfly_order(rows: int, step: int) -> Tensor:
    """The rows in the order in which a butterfly stage pairs them: groups of 2 · step, halves interleaved."""
    return torch.arange(rows).view(-1, 2, step).transpose(1, 2).flatten()
