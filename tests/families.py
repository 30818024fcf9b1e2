"""One adapter of every family for a weight of any shape, read from a file's tensors, with its float64 oracle.

The oracles are written from the papers' formulas alone. `family(name, shape, seed)` makes one, its tensors of
the sizes that trainings reach on a base of standard deviation BASE_STD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lib_precision_lora.adapters import Adapter, read_adapters

BASE_STD = 0.03
DELTA_STD = 0.003
"""Elements of one adapter's ΔW: a tenth of the base's."""

Shape = tuple[int, ...]
Change = Callable[[Tensor, float], Tensor]
"""(running rows W in float64, strength) → the rows after the adapter."""
Full = Callable[[Tensor], Tensor]
"""A(W), in float64: the weight at strength 1."""


@dataclass(frozen=True)
class Family:
    """tensors: one layer of a file, by key ending; full: what they mean."""

    tensors: dict[str, Tensor]
    full: Full

    @property
    def adapter(self) -> Adapter:
        return read_adapters({f"layer.{key}": value for key, value in self.tensors.items()})["layer"]

    def change(self, weight: Tensor, strength: float) -> Tensor:
        """`W + strength · (A(W) − W)`."""
        return weight + strength * (self.full(weight) - weight)


Make = Callable[[Shape, torch.Generator], Family]


def normal(g: torch.Generator, std: float, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g) * std


def added(tensors: dict[str, Tensor], delta: Tensor) -> Family:
    return Family(tensors, lambda weight: weight + delta.reshape(weight.shape))


def lora(rank: int, alpha: float, shape: Shape, g: torch.Generator) -> Family:
    """`ΔW = alpha / rank · up · down`."""
    std = math.sqrt(DELTA_STD / (alpha / rank * math.sqrt(rank)))
    up = normal(g, std, shape[0], rank, *(1 for _ in shape[2:]))
    down = normal(g, std, rank, *shape[1:])
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    return added(tensors, alpha / rank * up.double().flatten(1) @ down.double().flatten(1))


def loha(rank: int, shape: Shape, g: torch.Generator) -> Family:
    """`ΔW = alpha / rank · (w1_a w1_b) ∘ (w2_a w2_b)`, here with alpha = rank / 2."""
    std = (2 * DELTA_STD / rank) ** 0.25
    columns = math.prod(shape[1:])
    a1, a2 = normal(g, std, shape[0], rank), normal(g, std, shape[0], rank)
    b1, b2 = normal(g, std, rank, columns), normal(g, std, rank, columns)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    delta = 0.5 * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return added(tensors | {"alpha": torch.tensor(rank / 2)}, delta)


def loha_tucker(rank: int, shape: Shape, g: torch.Generator) -> Family:
    """`ΔW[o, i, k] = Σ t1[m, r, k] w1_b[r, i] w1_a[m, o] · Σ t2[m, r, k] w2_b[r, i] w2_a[m, o]`."""
    kernel = shape[2:] or (1,)
    std = (DELTA_STD / rank**2) ** (1 / 6)
    tensors, factors = {}, []
    for number in ("1", "2"):
        core, a, b = (
            normal(g, std, rank, rank, *kernel),
            normal(g, std, rank, shape[0]),
            normal(g, std, rank, shape[1]),
        )
        tensors |= {f"hada_t{number}": core, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
        factors.append(torch.einsum("mrk,ri,mo->oik", core.double().flatten(2), b.double(), a.double()))
    return added(tensors, factors[0] * factors[1])


def lokr(form: str, shape: Shape, g: torch.Generator) -> Family:
    """`ΔW = alpha / rank · w1 ⊗ w2`, the kernel with w2.

    form: which parts are factored: "full", "right", "both" or "tucker". alpha counts unless both are whole.
    """
    kernel = shape[2:]
    height, width = (next(n for n in (4, 2, 1) if size % n == 0) for size in shape[:2])
    p, q, rank, alpha = shape[0] // height, shape[1] // width, 2, 3.0
    left, std = normal(g, 1.0, height, width), DELTA_STD
    tensors: dict[str, Tensor] = {"lokr_w1": left, "alpha": torch.tensor(alpha)}
    exact_left, scale = left.double(), 1.0 if form == "full" else alpha / rank
    if form == "both":
        a, b = normal(g, 1.0, height, rank), normal(g, 1.0, rank, width)
        del tensors["lokr_w1"]
        tensors |= {"lokr_w1_a": a, "lokr_w1_b": b}
        exact_left = a.double() @ b.double()
    if form == "full":
        right = normal(g, std, p, q, *kernel)
        tensors |= {"lokr_w2": right}
        exact_right = right.double().reshape(p, -1)
    elif form == "tucker":
        core = normal(g, 1.0, rank, rank, *(kernel or (1,)))
        a, b = normal(g, std**0.5, rank, p), normal(g, std**0.5, rank, q)
        tensors |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        exact_right = torch.einsum(
            "mrk,ri,mo->oik", core.double().flatten(2), b.double(), a.double()
        ).flatten(1)
    else:
        a, b = normal(g, std**0.5, p, rank), normal(g, std**0.5, rank, q * math.prod(kernel))
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
        exact_right = a.double() @ b.double()
    blocks = torch.einsum("ab,pc->apbc", exact_left, exact_right)
    return added(tensors, scale * blocks.reshape(shape))


def dora(inner: Make, axis: str, shape: Shape, g: torch.Generator) -> Family:
    """`W' = (W + Δ) · m / ‖W + Δ‖`, norms of rows ("out") or of input channels ("in")."""
    base = inner(shape, g)
    ones = [1] * (len(shape) - 1)
    if axis == "out":
        kept, view = shape[0], (shape[0], *ones)
        typical = BASE_STD * math.sqrt(math.prod(shape[1:]))
    else:
        kept, view = shape[1], (1, shape[1], *ones[1:])
        typical = BASE_STD * math.sqrt(math.prod(shape) / shape[1])
    magnitude = typical * (1.0 + normal(g, 0.1, kept)).view(view)
    summed = [dim for dim in range(len(shape)) if dim != (0 if axis == "out" else 1)]

    def full(weight: Tensor) -> Tensor:
        moved = base.full(weight)
        norm = moved.square().sum(summed, keepdim=True).sqrt()
        return moved * magnitude.double() / norm

    return Family(base.tensors | {"dora_scale": magnitude}, full)


def glora(layout: str, shape: Shape, g: torch.Generator) -> Family:
    """`W' = W + alpha / rank · (W a1 a2 + b1 b2)`; in the old layout W a2 a1 + b2 b1."""
    rank, alpha, columns = 3, 1.5, math.prod(shape[1:])
    std = math.sqrt(DELTA_STD / (0.5 * math.sqrt(rank)))
    inner, outer = normal(g, 0.15, shape[1], rank), normal(g, 0.15, rank, shape[1])
    up, down = normal(g, std, shape[0], rank), normal(g, std, rank, columns)
    names = ("a1", "a2", "b1", "b2") if layout == "new" else ("a2", "a1", "b2", "b1")
    tensors = {f"{name}.weight": value for name, value in zip(names, (inner, outer, up, down), strict=True)}
    mixing = inner.double() @ outer.double()
    delta = (up.double() @ down.double()).reshape(shape)

    def full(weight: Tensor) -> Tensor:
        return weight + alpha / rank * (torch.einsum("oi...,ij->oj...", weight, mixing) + delta)

    return Family(tensors | {"alpha": torch.tensor(alpha)}, full)


def ia3(writer: str, axis: str, shape: Shape, g: torch.Generator) -> Family:
    """`W' = diag(l) W` or `W diag(l)`; LyCORIS keeps l − 1, PEFT l."""
    kept, ones = (shape[0] if axis == "out" else shape[1]), (1,) * (len(shape) - 2)
    values = normal(g, 0.1, kept)
    factor = 1.0 + values.double()
    if writer == "peft":
        view = (kept, 1) if axis == "out" and not ones else (1, kept, *ones)
        tensors = {"ia3_l": (1.0 + values).view(view)}
        factor = (1.0 + values).double()
    else:
        saved = values if not ones else values.view(1, kept, *ones)
        tensors = {"weight": saved, "on_input": torch.tensor(int(axis == "in"))}
    view = (kept, *(1 for _ in shape[1:])) if axis == "out" else (1, kept, *ones)
    return Family(tensors, lambda weight: weight * factor.view(view))


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


def glora_tucker(shape: Shape, g: torch.Generator) -> Family:
    """GLoRA with `Σ b1[o, m] bm[m, r, k] b2[r, i]` in the place of b1 b2."""
    rank, kernel = 3, shape[2:] or (1,)
    plain = glora("new", shape, g)
    std = math.sqrt(DELTA_STD / (0.5 * rank))
    up, core, down = (
        normal(g, std, shape[0], rank, *(1 for _ in shape[2:])),
        normal(g, 1.0, rank, rank, *kernel),
        normal(g, std, rank, shape[1], *(1 for _ in shape[2:])),
    )
    tensors = plain.tensors | {"b1.weight": up, "bm.weight": core, "b2.weight": down}
    inner, outer = (plain.tensors[f"{role}.weight"].double() for role in ("a1", "a2"))
    delta = torch.einsum(
        "om,mrk,ri->oik", up.double().flatten(1), core.double().flatten(2), down.double().flatten(1)
    ).reshape(shape)

    def full(weight: Tensor) -> Tensor:
        return weight + 0.5 * (torch.einsum("oi...,ij->oj...", weight, inner @ outer) + delta)

    return Family(tensors, full)


def diff(shape: Shape, g: torch.Generator) -> Family:
    value = normal(g, DELTA_STD, *shape)
    return added({"diff": value}, value.double())


LORA = partial(lora, 4, 2.0)
LOHA = partial(loha, 3)
FAMILIES: Mapping[str, Make] = {
    "lora": LORA,
    "loha": LOHA,
    "loha-streamed": partial(loha, 16),
    "loha-tucker": partial(loha_tucker, 2),
    **{f"lokr-{form}": partial(lokr, form) for form in ("full", "right", "both", "tucker")},
    **{f"dora-{axis}": partial(dora, LORA, axis) for axis in ("out", "in")},
    **{f"loha-dora-{axis}": partial(dora, LOHA, axis) for axis in ("out", "in")},
    **{f"lokr-dora-{axis}": partial(dora, partial(lokr, "right"), axis) for axis in ("out", "in")},
    "glora": partial(glora, "new"),
    "glora-old": partial(glora, "old"),
    **{f"ia3-{axis}": partial(ia3, "lycoris", axis) for axis in ("out", "in")},
    **{f"ia3-peft-{axis}": partial(ia3, "peft", axis) for axis in ("out", "in")},
    "oft": partial(oft, False, False),
    "oft-constraint": partial(oft, True, False),
    "oft-rescale": partial(oft, False, True),
    "boft": partial(boft, False),
    "boft-rescale": partial(boft, True),
    "diff": diff,
    "oft-peft": partial(input_oft, False),
    "oft-peft-shared": partial(input_oft, True),
    "boft-peft": input_boft,
    "glora-tucker": glora_tucker,
}

INPUT_ROTATIONS = ("oft-peft", "oft-peft-shared", "boft-peft")
OUTPUT_ROTATIONS = tuple(name for name in FAMILIES if "oft" in name and name not in INPUT_ROTATIONS)


def family(name: str, shape: Shape, seed: int = 0) -> Family:
    """One of FAMILIES for a weight of this shape; sizes are even, so that rotations have blocks."""
    g = torch.Generator().manual_seed(1000 * seed + list(FAMILIES).index(name))
    return FAMILIES[name](shape, g)
