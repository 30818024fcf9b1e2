"""The branch of a normalization: linear in its weight, so the same norm runs with the delta and is added.

norm(x; W + dW, b + db) = norm(x; W, b) + x̂ · dW + db        x̂ the normalized input
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.algebra.vector import DeltaVector
from lib_precision_lora.branch.arithmetic.token_chunks import token_chunks
from lib_precision_lora.branch.forward.rows import accumulate
from lib_precision_lora.branch.forward.wide_input import WideInput
from lib_precision_lora.memory.chunks import WORKSPACE_BYTES


class NormBranch:
    """Runs on the input and the output of a LayerNorm, GroupNorm or RMS norm over the last axis, in fp32."""

    wide_input: WideInput | None = None
    turns_inputs = False
    given: Tensor | None = None

    def __init__(self, weight: EffectiveWeight | None, bias: EffectiveWeight | None) -> None:
        self.weight = None if weight is None else DeltaVector(weight)
        self.bias = None if bias is None else DeltaVector(bias)

    def turned(self, x: Tensor) -> None:
        return None

    def structure(self) -> tuple[object, ...]:
        return NormBranch, self.weight is None, self.bias is None

    def restrength(self, other: NormBranch) -> None:
        self.weight, self.bias = other.weight, other.bias

    def release(self) -> None:
        for vector in (self.weight, self.bias):
            if vector is not None:
                vector.release()

    def placed(self) -> Iterator[Tensor]:
        for vector in (self.weight, self.bias):
            placed = None if vector is None else vector.placed
            if placed is not None:
                yield placed

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """`y + x̂ · dW + db`, in y's memory where it is contiguous."""
        scale = None if self.weight is None else self.weight.on(y.device)
        shift = None if self.bias is None else self.bias.on(y.device)
        y = y.contiguous()
        if isinstance(module, nn.GroupNorm):
            for index in range(x.shape[0]):
                _add_groups(module, x[index], y[index], scale, shift)
            return y
        for x_chunk, y_chunk in token_chunks(x, y, max(1, WORKSPACE_BYTES // (16 * y.shape[-1]))):
            _add_tokens(module, x_chunk, y_chunk, scale, shift)
        return y


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """x̂ over the last axis, by the module's own epsilon; x: [tokens, width] fp32."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + rms_epsilon(module))


def rms_epsilon(module: nn.Module) -> float:
    """The epsilon of an RMS norm: `eps`, or `variance_epsilon` as T5 calls it."""
    epsilon = getattr(module, "eps", None)
    if epsilon is None:
        epsilon = getattr(module, "variance_epsilon", None)
    return torch.finfo(torch.float32).eps if epsilon is None else float(epsilon)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalizes the last axis (LayerNorm, RMS norms of any name) or channel groups."""
    if len(getattr(module, "normalized_shape", (1,))) != 1:
        return False
    name = type(module).__name__
    known = isinstance(module, (nn.LayerNorm, nn.GroupNorm))
    return known or "RMSNorm" in name or name == "T5LayerNorm"


def _add_tokens(module: nn.Module, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """One chunk of tokens, in place; x, y: [tokens, width]."""
    delta: Tensor | float = 0.0
    if scale is not None:
        delta = normalized(module, x.float()) * scale
    accumulate(y, delta if shift is None else delta + shift)


def _add_groups(
    module: nn.GroupNorm, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None
) -> None:
    """One sample of a GroupNorm, group by group, in place; x, y: [channels, …]."""
    width = x.shape[0] // module.num_groups
    for start in range(0, x.shape[0], width):
        channels = slice(start, start + width)
        shape = (width, *[1] * (x.ndim - 1))
        parts = [None if vector is None else vector[channels].view(shape) for vector in (scale, shift)]
        _add_group(module, x[channels], y[channels], *parts)


def _add_group(
    module: nn.GroupNorm, x: Tensor, y: Tensor, scale: Tensor | None, shift: Tensor | None
) -> None:
    """One group of channels of one sample, in place."""
    delta: Tensor | float = 0.0
    if scale is not None:
        delta = functional.group_norm(x[None].float(), 1, None, None, module.eps)[0] * scale
    accumulate(y, delta if shift is None else delta + shift)
