"""A forward through a patched layer, beside the same forward in float64 with the merged weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, Patch, PatchSession
from tests.branch.hosts import Holder
from tests.oracles import Step, allowed_error, merge

Pairs = Mapping[str, Sequence[tuple[Patch, Step]]]
"""Patches with their oracle steps, by the layer's parameter ("weight", "bias", "scale")."""


@dataclass(frozen=True)
class Forward:
    """host: the layer's output without patches; patched: with them; exact_base, exact: both in float64."""

    host: Tensor
    patched: Tensor
    exact_base: Tensor
    exact: Tensor

    @property
    def error(self) -> float:
        return float((self.patched.double() - self.exact).norm())

    @property
    def allowed(self) -> float:
        return allowed_error(self.exact, self.exact_base, self.host)

    @property
    def delta_error(self) -> float:
        """`‖(y − y₀) − Δy‖ / ‖Δy‖`, for activations whose own rounding is far smaller."""
        delta = self.exact - self.exact_base
        if not delta.numel():
            return 0.0
        return float((self.patched.double() - self.host.double() - delta).norm() / delta.norm())


def exact_layer(layer: nn.Module, pairs: Pairs, base: Mapping[str, Tensor]) -> nn.Module:
    """The layer in float64, its weights merged; base: decoded values where they are not the stored ones."""
    exact = copy.deepcopy(layer).double()
    for name, parameter in exact.named_parameters():
        merged, _ = merge(base.get(name, parameter.data), [step for _, step in pairs.get(name, ())])
        parameter.data = merged
    return exact


def forward(
    layer: nn.Module,
    pairs: Pairs,
    x: Tensor,
    compute: Compute = "auto",
    base: Mapping[str, Tensor] | None = None,
) -> Forward:
    """One forward of `layer(x)` with and without these patches, and both in float64."""
    holder = Holder(layer)
    wide = x.double() if x.is_floating_point() else x
    exact_base, exact = (exact_layer(layer, chosen, base or {})(wide) for chosen in ({}, pairs))
    host = layer(x).clone()
    with PatchSession(holder) as session:
        session.apply_patches([patch for steps in pairs.values() for patch, _ in steps], compute)
        patched = layer(x)
    assert patched.dtype == host.dtype
    assert patched.shape == host.shape
    assert torch.equal(layer(x), host)
    assert float((exact - exact_base).norm()) > 0.0 or not x.numel()
    return Forward(host, patched, exact_base, exact)


def assert_exact_forward(
    layer: nn.Module,
    pairs: Pairs,
    x: Tensor,
    compute: Compute = "auto",
    base: Mapping[str, Tensor] | None = None,
) -> None:
    """Law 2 for one forward; in fp16 mode with fp32 activations, the fp16 figure of the delta."""
    result = forward(layer, pairs, x, compute, base)
    if compute == "fp16" and result.host.dtype == torch.float32:
        assert result.delta_error <= 1e-3, f"{result.delta_error:.2e}"
    else:
        assert result.error <= result.allowed, f"{result.error:.3e} of {result.allowed:.3e}"
