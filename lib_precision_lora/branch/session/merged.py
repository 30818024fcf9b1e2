"""A merged layer: while attached, parameters that hold `round(W_eff)` stand in the place of the host's own.

For dense fp16 and fp32 layers alone (`policy.py`). Each forward is then the layer's own, and the weight is
rounded once. The host's parameter objects are kept, unwritten, on the CPU where the layer is on an
accelerator, and put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.branch.algebra.effective import EffectiveWeight, Piece
from lib_precision_lora.branch.algebra.identity import exact_identity
from lib_precision_lora.branch.algebra.reading import Reader
from lib_precision_lora.branch.arithmetic.device_copies import copied
from lib_precision_lora.branch.forward.branch import Branch
from lib_precision_lora.branch.forward.shadow import Shadow, empty_parameter, move_values
from lib_precision_lora.branch.session.sites import Site
from lib_precision_lora.branch.session.undo import run_all
from lib_precision_lora.storage import StoredWeight, stored_weight


class NotRepresentable(ArithmeticError):
    """The effective weight does not fit into the type of the stored one."""


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """What makes one parameter's W_eff of its W0; the base itself is read anew when it is needed, since
    whoever holds it holds its memory."""

    pieces: tuple[Piece, ...]
    steps: tuple[Add | Left, ...]


class Merged:
    """The merged parameters of one linear, conv or embedding module.

    branch: what runs instead where `attach` or `restrength` raise `NotRepresentable`.
    """

    def __init__(self, shadows: Sequence[Shadow], merges: Sequence[Merge], branch: Branch) -> None:
        self.shadows, self.merges, self.branch = tuple(shadows), tuple(merges), branch

    def attach(self) -> None:
        """Merge, then exchange the parameters. Leaves the module as it was where it raises."""
        try:
            for shadow in self.shadows:
                _give_room(shadow)
            self.write()
            for shadow in self.shadows:
                shadow.attach()
                park(shadow.original)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        run_all([partial(shadow.detach, keep=False) for shadow in self.shadows])

    def placed(self) -> Iterator[Tensor]:
        """Nothing beside the base: on a device, what is merged takes the place of the original."""
        yield from ()

    @property
    def stands(self) -> bool:
        """Whether what was attached is still what the module reads, in the type of the host's parameter.

        Also where the module is gone: there is nothing to put back.
        """
        return all(
            shadow.module() is None or (shadow.stands and shadow.shadow.dtype == shadow.original.dtype)
            for shadow in self.shadows
        )

    def structure(self) -> tuple[object, ...]:
        """Equal for two merges of the same parameters, whatever is merged into them."""
        return Merged, tuple((shadow.attribute, id(shadow.original)) for shadow in self.shadows)

    def equals(self, other: Merged) -> bool:
        """Whether a merge of equal structure has the same result."""
        return all(
            exact_identity(mine.pieces, mine.steps) == exact_identity(its.pieces, its.steps)
            for mine, its in zip(self.merges, other.merges, strict=True)
        )

    def restrength(self, other: Merged) -> None:
        """Write another merge of the same parameters into the memory of this one, from the originals.

        Raises `NotRepresentable`; what is written then is neither.
        """
        former = self.merges, self.branch
        self.merges, self.branch = other.merges, other.branch
        try:
            self.write()
        except NotRepresentable:
            self.merges, self.branch = former
            raise

    def write(self) -> None:
        """Bring the standing parameters to `round(W_eff)`."""
        for shadow, merge in zip(self.shadows, self.merges, strict=True):
            write_merged(shadow.shadow.data, shadow.original, merge)


def make_merged(
    module: nn.Module,
    parts: Sequence[tuple[Site, EffectiveWeight]],
    branch: Branch,
) -> Merged:
    """A merge of these parameters of the module; nothing is computed before it is attached."""
    shadows = []
    for site, _ in parts:
        assert isinstance(site.parameter, nn.Parameter)
        shadow = empty_parameter(site.parameter.dtype)
        shadows.append(Shadow(weakref.ref(module), site.attribute, site.parameter, shadow))
    return Merged(shadows, [Merge(weight.pieces, weight.steps) for _, weight in parts], branch)


def write_merged(target: Tensor, original: Tensor, merge: Merge) -> None:
    """`target = round(W_eff)`, block by block, with sums in fp32 or better and one rounding.

    target: of the original's shape, any device and strides. Raises `NotRepresentable` where a value leaves
    the range of target's type.
    """
    stored = stored_weight(original)
    steps = [copied(step, target.device) if isinstance(step, Add) else step for step in merge.steps]
    # fp64: products in fp32 may be TF32 there, if the process lets them
    wide = torch.float64 if target.device.type == "cuda" else torch.float32
    reader = Reader(Elsewhere(stored.shape, stored.kind, stored, target.device), merge.pieces, steps, wide)
    finite = torch.ones((), dtype=torch.bool, device=target.device)
    with torch.inference_mode():
        for rows, columns, block in reader.blocks():
            rounded = block.to(target.dtype)
            finite &= rounded.isfinite().all()
            put_block(target, rows, columns, rounded.to(target.device))
            del block, rounded  # or they would live while the next ones are made
    if not bool(finite):
        raise NotRepresentable(f"a merged value is not finite in {target.dtype}")


def park(original: nn.Parameter) -> None:
    """Keep the values of a merged layer's original on the CPU: there is no second copy on an accelerator."""
    if original.device.type != "cpu":
        move_values(original, torch.device("cpu"), original.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Elsewhere(StoredWeight):
    """A stored weight whose rows are read on another device than they lie on."""

    stored: StoredWeight
    device: torch.device

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def decode_rows(self, start: int, stop: int) -> Tensor:
        return self.stored.rows(start, stop).to(self.device)


def _give_room(shadow: Shadow) -> None:
    """Memory like the original's for what is merged: its device, type and strides, pinned where that is."""
    value = shadow.original.data
    pinned = value.device.type == "cpu" and value.is_pinned()
    with torch.inference_mode(False):
        shadow.shadow.data = torch.empty_like(value, pin_memory=pinned)


def put_block(target: Tensor, rows: slice, columns: slice, block: Tensor) -> None:
    """`target[rows, columns] = block`, the columns counted over all but the first axis; where not all of
    them, all rows."""
    width = target[0].numel()
    if columns == slice(0, width):
        target[rows].copy_(block.reshape(-1, *target.shape[1:]))
        return
    numbers = torch.arange(columns.start, columns.stop, device=target.device)
    index: Any = (slice(None), *torch.unravel_index(numbers, target.shape[1:]))
    target[index] = block
