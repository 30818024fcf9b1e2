"""One adapter of every family for a weight of any shape, read from a file's tensors, with its float64 oracle.

The oracles are written from the papers' formulas alone. `family(name, shape, seed)` makes one, its tensors of
the sizes that trainings reach on a base of standard deviation BASE_STD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tests.family import BASE_STD, DELTA_STD, Family, Make, Shape, added, normal
from tests.rotation_families import boft, input_boft, input_oft, oft


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
