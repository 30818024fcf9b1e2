"""The session: attaches a patch set to a model, changes it, and takes it off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_precision_lora.branch.compose import Branch, effective_weights, make_attachments
from lib_precision_lora.branch.fitted import FittedAdapters
from lib_precision_lora.branch.memo import Memo
from lib_precision_lora.branch.patch import Applied, Patch, PatchItem, resolve
from lib_precision_lora.branch.product import Compute
from lib_precision_lora.branch.shadow import Shadow

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
        self._fitted = FittedAdapters()
        self._memo = Memo()

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
        weights = effective_weights(self._living_model(), patches, self._fitted, shadows, self._memo)
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
        self._fitted.keep_used()
        self._memo.keep_used()

    def clear(self) -> None:
        """Take everything off; the model's parameters are the objects they were."""
        for name in list(self._attached):
            self._attached.pop(name).detach()

    def release(self) -> None:
        """Let go of all device memory; the next forward places the factors again."""
        for attached in self._attached.values():
            if not isinstance(attached.piece, Shadow):
                attached.piece.release()

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
    """Make a branch run after the module's forward (and before it, where the input is widened), or put a
    shadow in its place."""
    if isinstance(piece, Shadow):
        piece.attach()
        return Attached(weakref.ref(module), piece, piece.detach)
    handles: list[RemovableHandle] = [module.register_forward_hook(_hook(piece), with_kwargs=True)]
    if piece.wide_input is not None:
        handles.append(module.register_forward_pre_hook(piece.wide_input.narrow, with_kwargs=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return Attached(weakref.ref(module), piece, detach)


def _hook(branch: Branch) -> Callable[..., Tensor]:
    def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        if branch.wide_input is not None:
            x = branch.wide_input.take()
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
