"""Layers whose forward makes its output and nothing else, and what a patch set takes beside them, measured.

The base's own arithmetic says nothing about the memory of a branch; left out, it takes no time either.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib_precision_lora.branch import Compute, DensePolicy, Patch, PatchSession
from lib_precision_lora.memory.meter import ByteMeter


class Linear(nn.Module):
    """Named as hosts name a linear layer; its weight may be stored in any format."""

    def __init__(self, weight: Tensor, rows: int, scale_weight: Tensor | None = None) -> None:
        """rows: of the logical weight."""
        super().__init__()
        stored = isinstance(weight, nn.Parameter)
        self.weight = weight if stored else nn.Parameter(weight, requires_grad=False)
        self.rows, self.bias, self.scale_weight = rows, None, scale_weight

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.rows)


class Conv(nn.Conv2d):
    """A convolution of stride 1, as most of U-Nets are."""

    def forward(self, x: Tensor) -> Tensor:
        sides = zip(x.shape[-2:], self.kernel_size, self.padding, strict=True)
        size = [side + 2 * padding - kernel + 1 for side, kernel, padding in sides]
        return x.new_zeros(*x.shape[:-3], self.out_channels, *size)


@dataclass(frozen=True)
class Measured:
    """Bytes beyond those of the bare forward.

    predicted_*: from shapes alone, before anything was attached. attach: while branches are made; resident:
    while factors are placed and the first forward runs; streamed: in a forward with all factors in RAM,
    which are not counted. live: factors that have memory of their own on the device; placed: all of them.
    """

    predicted_factors: int
    predicted_own: int
    predicted_workspace: int
    predicted_host: int
    attach: int
    resident: int
    streamed: int
    live: int
    placed: int

    @property
    def predicted(self) -> int:
        """The extra peak where files and factors lie on one device, and share memory."""
        return self.predicted_own + self.predicted_workspace

    @property
    def predicted_streamed(self) -> int:
        """The extra peak where everything is streamed through the device, and the layer is the only one."""
        return self.predicted_factors + self.predicted_workspace

    @property
    def peak(self) -> int:
        return max(self.attach, self.resident)

    @property
    def peak_streamed(self) -> int:
        return max(self.attach, self.streamed)


def measure(
    model: nn.Module,
    patches: Sequence[Patch],
    x: Tensor,
    compute: Compute = "auto",
    dense: DensePolicy = "branch",
    tokens: int | None = None,
) -> Measured:
    """One patch set on a model that is called with `x`; tokens: by default all rows of x."""
    session = PatchSession(model)
    planned = session.footprints(patches, compute, x.device, x.dtype, dense)
    count = tokens or x.numel() // x.shape[-1]
    bare, _ = peak_of(lambda: model(x))
    attach, _ = peak_of(lambda: session.apply_patches(patches, compute, dense))

    def place_and_run() -> Tensor:
        session.place(x.device, x.dtype)
        return model(x)

    resident, live = peak_of(place_and_run)
    placed = session.placed_bytes
    session.place(x.device, x.dtype, resident=frozenset())
    streamed, _ = peak_of(lambda: model(x))
    session.clear()
    return Measured(
        sum(each.factor_bytes for each in planned.values()),
        sum(each.factor_bytes - each.shared for each in planned.values()),
        max(each.workspace_bytes(count) for each in planned.values()),
        sum(each.host_bytes for each in planned.values()),
        attach,
        resident - bare,
        streamed - bare,
        live,
        placed,
    )


def peak_of(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes alive at once, and bytes that stay when the result is gone."""
    with torch.no_grad(), ByteMeter() as meter:
        result = run()
    del result
    gc.collect()
    return meter.peak, meter.live
