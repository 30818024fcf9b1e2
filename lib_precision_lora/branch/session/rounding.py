"""The parameters of an applied set as a file keeps them: `round(W_eff)`, and what the rounding costs.

    cost = ‖round(W_eff) − W_eff‖ / ‖W_eff − W0‖        Frobenius norms, over one parameter or many

0 where nothing is lost; 1 where the rounding is as large as all that the LoRAs change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.algebra.reading import BLOCK_BYTES, Reader
from lib_precision_lora.branch.session.merged import Elsewhere, put_block
from lib_precision_lora.branch.session.patch import PatchError
from lib_precision_lora.branch.session.sites import Site
from lib_precision_lora.storage import StorageError, StoredWeight, encode


@dataclass(frozen=True, slots=True)
class Loss:
    """Of one parameter: ‖round(W_eff) − W_eff‖² and ‖W_eff − W0‖². kind: as it is written."""

    name: str
    kind: str
    error: float
    change: float

    @property
    def cost(self) -> float:
        return cost_of([self])


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """entries: what the module's state dict holds instead, by name within the module."""

    entries: Mapping[str, Tensor]
    loss: Loss


def cost_of(losses: Iterable[Loss]) -> float:
    """Of several parameters together; 0 where nothing was changed."""
    losses = list(losses)
    change = math.fsum(loss.change for loss in losses)
    return math.sqrt(math.fsum(loss.error for loss in losses) / change) if change else 0.0


def rounded(name: str, site: Site, effective: EffectiveWeight) -> Rounded:
    """One parameter, whole in fp32 while it is rounded; on its own device, or where that has no room for it,
    on the CPU.

    Raises `PatchError`, naming the parameter, for values that its type cannot hold.
    """
    stored = effective.stored
    try:
        try:
            return _rounded(name, site, effective, stored)
        except torch.cuda.OutOfMemoryError:
            cpu = Elsewhere(stored.shape, stored.kind, stored, torch.device("cpu"))
            return _rounded(name, site, effective, cpu)
    except (AdapterError, StorageError) as error:
        raise PatchError(f"layer {name}: {error}", None, name) from error


@torch.no_grad()
def _rounded(name: str, site: Site, effective: EffectiveWeight, stored: StoredWeight) -> Rounded:
    values = materialized(effective, stored)
    encoded = encode(site.module, site.attribute, site.parameter, values)
    height = max(1, BLOCK_BYTES // (8 * math.prod(values.shape[1:])))
    error = change = 0.0
    for low in range(0, len(values), height):
        block = values[low : low + height].double()
        high = low + len(block)
        error += float((encoded.weight.rows(low, high).to(block.device).double() - block).square().sum())
        change += float((stored.rows(low, high).to(block.device).double() - block).square().sum())
        del block  # or it would live while the next one is made
    return Rounded(encoded.entries, Loss(name, encoded.weight.kind, error, change))


def materialized(effective: EffectiveWeight, stored: StoredWeight | None = None) -> Tensor:
    """W_eff, whole: fp32 (fp64 for an fp64 base), read in blocks, on the device where the base is read.

    stored: the base, where it is to be read elsewhere.
    """
    stored = effective.stored if stored is None else stored
    exact = stored.kind == "dense-fp64"
    device = stored.rows(0, 0).device
    # fp64: products in fp32 may be TF32 there, if the process lets them
    wide = torch.float64 if exact or device.type == "cuda" else torch.float32
    values = torch.empty(stored.shape, dtype=torch.float64 if exact else torch.float32, device=device)
    for rows, columns, block in Reader(stored, effective.pieces, effective.steps, wide).blocks():
        put_block(values, rows, columns, block.to(values))
        del block  # or it would live while the next one is made
    return values
