"""Plain LoRA and LoCon: `ΔW = alpha / rank · up · down`, linear and convolutional."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError, as_float_factor, require_finite
from lib_precision_lora.adapters.additive import add_term, read_alpha, require_shape
from lib_precision_lora.adapters.diff import Diff, make_diff
from lib_precision_lora.adapters.steps import Running, Step
from lib_precision_lora.adapters.terms import LowRank
from lib_precision_lora.strict_product import strict


@dataclass(frozen=True, slots=True, eq=False)
class LoRA:
    """`ΔW = scale · up · down`.

    up: [out, rank]; down: [rank, in · kernel]; scale = alpha / rank, or 1 where the file has no alpha.
    A Tucker core (LoCon's `mid`) is folded into `down` when the file is read. sizes: as in `LowRank`.
    """

    up: Tensor
    down: Tensor
    scale: float
    kind: str = "lora"
    sizes: tuple[float, float] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.up, self.down

    def check(self, shape: tuple[int, ...]) -> None:
        require_shape(self.up.shape[0], self.down.shape[1], shape)

    def reordered(self, order: Tensor) -> LoRA:
        return dataclasses.replace(self, up=self.up[order])

    @property
    def term(self) -> LowRank:
        return LowRank(self.up, self.down, self.sizes)

    def compose(self, running: Running, strength: float) -> tuple[Step, ...]:
        return add_term(self, running, strength)


def make_lora(
    name: str, up: Tensor, down: Tensor, alpha: float | None = None, mid: Tensor | None = None
) -> LoRA:
    """A `LoRA` from the tensors of a file.

    up: [out, rank] or [out, rank, 1, …]; down: [rank, in] or [rank, in, *kernel];
    mid: [rank, rank, *kernel], then down: [rank, in] or [rank, in, 1, …].
    Raises `AdapterError`: zero rank, factors that do not meet, NaN or inf, no float type.
    """
    up = as_float_factor(name, "lora_up", up)
    down = as_float_factor(name, "lora_down", down)
    mid = None if mid is None else as_float_factor(name, "lora_mid", mid)
    if up.ndim < 2 or down.ndim < 2:
        raise AdapterError(
            f"{name}: the factors have shapes {list(up.shape)} and {list(down.shape)}, not matrices"
        )
    rank = down.shape[0]
    if rank == 0 or up.shape[1] == 0:
        raise AdapterError(f"{name}: the rank is zero, the file holds no LoRA for this layer")
    if alpha is not None and not math.isfinite(alpha):
        raise AdapterError(f"{name}: alpha is {alpha}; the file is damaged")
    up_size, down_size, *_ = require_finite(name, lora_up=up, lora_down=down, lora_mid=mid)
    if mid is not None:
        down = fold_tucker_core(name, mid, down)
        (down_size,) = require_finite(name, **{"lora_mid · lora_down": down})
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[1] != down.shape[0]:
        raise AdapterError(f"{name}: lora_up has rank {up.shape[1]} and lora_down has rank {down.shape[0]}")
    return LoRA(up, down, 1.0 if alpha is None else alpha / rank, sizes=(up_size, down_size))


def read_lora(name: str, tensors: Mapping[str, Tensor]) -> LoRA | None:
    """The LoRA among one layer's tensors, by role; None where there is none.

    On a vocabulary PEFT keeps the transposed ones, [rank, words] and [dimension, rank].

    Raises `AdapterError` for half a LoRA and for what `make_lora` refuses.
    """
    up, down = tensors.get("lora_up"), tensors.get("lora_down")
    if up is None and down is None and {"lora_embedding_up", "lora_embedding_down"} <= tensors.keys():
        up, down = tensors["lora_embedding_down"].T, tensors["lora_embedding_up"].T
    if up is None and down is None:
        return None
    if up is None or down is None:
        missing = "lora_up" if up is None else "lora_down"
        raise AdapterError(f"{name}: {missing} is missing, the file is incomplete")
    return make_lora(name, up, down, read_alpha(name, tensors), tensors.get("lora_mid"))


def read_bias(name: str, tensors: Mapping[str, Tensor], scale: float) -> Diff | None:
    """`Δb = scale · b`, b the bias of `lora_up`; None where it has none.

    From `y += scale · (up (down x) + b)`, as PEFT trains it with `lora_bias`, and BFL its control LoRAs.
    """
    if "lora_up_bias" not in tensors:
        return None
    value = make_diff(name, tensors["lora_up_bias"]).value
    return Diff(value if scale == 1.0 else scale * value.float())


def fold_tucker_core(
    name: str, mid: Tensor, down: Tensor, roles: tuple[str, str] = ("lora_mid", "lora_down")
) -> Tensor:
    """`down'[m, i, k…] = Σᵣ mid[m, r, k…] · down[r, i]`, in fp32.

    mid: [m, r, *kernel]; down: [r, in] or [r, in, 1, …]; roles: their names; returns [m, in, *kernel].
    Source: Tucker-2 decomposition of a convolution (LyCORIS, arXiv 2309.14859, section 3).
    """
    inner = down.flatten(1)
    if mid.ndim < 3 or mid.shape[1] != inner.shape[0]:
        raise AdapterError(
            f"{name}: {roles[0]} has shape {list(mid.shape)}, which does not meet "
            f"{roles[1]} {list(down.shape)}"
        )
    folded = strict(partial(torch.einsum, "mrk,ri->mik"), mid.flatten(2).float(), inner.float())
    return folded.reshape(mid.shape[0], inner.shape[1], *mid.shape[2:])
