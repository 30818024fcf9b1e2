"""The session: attaches a patch set to a model, changes it, and takes it off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_precision_lora.branch.chunks import operand_copies
from lib_precision_lora.branch.compose import (
    Branch,
    Reordered,
    effective_weights,
    make_attachments,
    out_of_memory,
)
from lib_precision_lora.branch.footprint import Footprint, footprints
from lib_precision_lora.branch.memo import Memo
from lib_precision_lora.branch.operands import WeightBranch
from lib_precision_lora.branch.patch import Applied, Patch, PatchItem, resolve
from lib_precision_lora.branch.product import Compute, choose_product
from lib_precision_lora.branch.shadow import Shadow
from lib_precision_lora.branch.sketch import SketchedWeight
from lib_precision_lora.branch.streaming import FactorStream

Undo = list[Callable[[], None]]


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """What stands at one module, or one shadowed parameter, and how to take it off."""

    module: weakref.ref[nn.Module]
    piece: Branch | Shadow
    detach: Callable[[], None]


class PatchSession:
    """Runs a patch set beside the modules of one model.

    `apply` is all or nothing. What stays the same from one set to the next stays attached: a change of
    strength exchanges a few numbers per layer. The session refers to the model weakly, and the model to
    the session not at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._attached: dict[str, Attached] = {}
        self._reordered = Reordered()
        self._memo = Memo()
        self._stream = FactorStream()

    def apply(self, items: Sequence[PatchItem], compute: Compute = "auto") -> Applied:
        """Attach these files, each `(name, adapters, strength)`, in this order, instead of the former set.

        Raises `PatchError` (file, layer and numbers) and leaves everything as it was.
        """
        patches, applied = resolve(self._living_model(), items)
        self.apply_patches(patches, compute)
        return applied

    def apply_patches(self, patches: Sequence[Patch], compute: Compute = "auto") -> None:
        """`apply`, for patches whose parameters are resolved already."""
        shadows = [here.piece for here in self._attached.values() if isinstance(here.piece, Shadow)]
        weights = effective_weights(self._living_model(), patches, self._reordered, shadows, self._memo)
        wanted = make_attachments(weights, compute)
        undo: Undo = []
        before = dict(self._attached)
        try:
            for name in [name for name in before if name not in wanted]:
                self._remove(name, undo)
            for name, (site, piece) in wanted.items():
                self._put(name, site.module, piece, undo)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        self._reordered.keep_only(patches)
        self._memo.keep_used()

    def clear(self) -> None:
        """Take everything off; the model's parameters are the objects they were."""
        for name in list(self._attached):
            self._attached.pop(name).detach()

    def release(self) -> None:
        """Let go of all device memory; the next forward places the factors again."""
        self._stream.forget()
        for attached in self._attached.values():
            if not isinstance(attached.piece, Shadow):
                attached.piece.release()

    def footprints(
        self, patches: Sequence[Patch], compute: Compute, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Footprint]:
        """What each module's branch would take on this device, for activations of this type, by name.

        Nothing is placed, attached, or read from the base. Raises `PatchError` as `apply_patches` does.
        """
        shadows = [here.piece for here in self._attached.values() if isinstance(here.piece, Shadow)]
        model = self._living_model()
        weights = effective_weights(model, patches, self._reordered, shadows, begin=SketchedWeight)
        product = choose_product(compute, device, dtype)
        return footprints(weights, product.half, operand_copies(product, device))

    def place(
        self, device: torch.device, dtype: torch.dtype, resident: Collection[str] | None = None
    ) -> None:
        """Bring the factors to where forwards on this device, with activations of this type, expect them.

        resident: the modules whose factors stay on the device, all where None; the others' stay in RAM and
        are streamed. Raises `PatchMemoryError`, with layer and bytes, where there is no memory; the device
        then holds no factors at all.
        """
        for name, attached in self._attached.items():
            piece = attached.piece
            if not isinstance(piece, WeightBranch):
                continue
            piece.spare = self._stream
            piece.reside(None if resident is None or name in resident else self._stream)
            try:
                piece.ready(device, dtype)
            except torch.cuda.OutOfMemoryError as error:
                self.release()
                raise out_of_memory(name, piece.factor_bytes, error) from error

    @property
    def streamed(self) -> tuple[str, ...]:
        """The modules whose factors stay in RAM."""
        pieces = ((name, attached.piece) for name, attached in self._attached.items())
        return tuple(n for n, piece in pieces if isinstance(piece, WeightBranch) and piece.stream is not None)

    @property
    def placed_bytes(self) -> int:
        """Bytes of factors that stand where forwards expect them; streamed ones do not."""
        sizes: dict[int, int] = {}
        for attached in self._attached.values():
            piece = attached.piece
            if isinstance(piece, WeightBranch) and piece.stream is not None:
                continue
            for tensor in piece.placed():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(sizes.values())

    @property
    def attached(self) -> tuple[str, ...]:
        """The modules and shadowed parameters at which something stands now."""
        return tuple(self._attached)

    def __enter__(self) -> PatchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def _living_model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this session is gone")
        return model

    def _put(self, name: str, module: nn.Module, piece: Branch | Shadow, undo: Undo) -> None:
        """Bring one place from what stands there to `piece`, and say how to undo it."""
        present = self._attached.get(name)
        if present is not None and present.module() is module and _same_structure(present.piece, piece):
            state = dict(vars(present.piece))
            undo.append(lambda: vars(present.piece).update(state))
            present.piece.restrength(piece)  # type: ignore[union-attr]
            return
        if present is not None:
            self._remove(name, undo)
        self._attached[name] = attach(module, piece)
        undo.append(lambda: self._attached.pop(name).detach())

    def _remove(self, name: str, undo: Undo) -> None:
        gone = self._attached.pop(name)
        gone.detach()

        def put_back() -> None:
            module = gone.module()
            if module is not None:
                self._attached[name] = attach(module, gone.piece)

        undo.append(put_back)


def attach(module: nn.Module, piece: Branch | Shadow) -> Attached:
    """Make a branch run after the module's forward, or put a shadow in its place."""
    if isinstance(piece, Shadow):
        piece.attach()
        return Attached(weakref.ref(module), piece, piece.detach)
    handle: RemovableHandle = module.register_forward_hook(_hook(piece), with_kwargs=True)
    return Attached(weakref.ref(module), piece, handle.remove)


def _hook(branch: Branch) -> Callable[..., Tensor]:
    def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if _autocast_enabled(output.device.type):
            with torch.autocast(output.device.type, enabled=False):
                return branch(module, x, output)
        return branch(module, x, output)

    return run


def _autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except TypeError:  # torch 2.3 asks without a device
        return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def _same_structure(present: Branch | Shadow, wanted: Branch | Shadow) -> bool:
    if isinstance(present, Shadow) or isinstance(wanted, Shadow):
        return False
    return present.structure() == wanted.structure()
