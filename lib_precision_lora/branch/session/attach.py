"""Putting a branch, a shadow or a merged layer on its module, and taking it off."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_precision_lora.branch.forward.branch import Branch
from lib_precision_lora.branch.forward.shadow import Shadow
from lib_precision_lora.branch.forward.wide_input import with_input
from lib_precision_lora.branch.session.compose import Piece
from lib_precision_lora.branch.session.merged import Merged
from lib_precision_lora.branch.session.overhead import OverheadMeter
from lib_precision_lora.branch.session.rescue import Rescue, beside
from lib_precision_lora.branch.session.undo import Undo, run_all

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """What stands at one module, or one shadowed parameter, and how to take it off."""

    module: weakref.ref[nn.Module]
    piece: Piece
    detach: Callable[[], None]


def attach(module: nn.Module, piece: Piece, meter: OverheadMeter, rescue: Rescue, name: str) -> Attached:
    """Make a branch run after the module's forward (and before it, where the input is widened), or put
    other parameters in place.

    meter: what times the branch; rescue: what goes on where it fails; name: the module's.
    """
    if isinstance(piece, Shadow | Merged):
        piece.attach()
        return Attached(weakref.ref(module), piece, piece.detach)
    run = _hook(piece, meter, rescue, name)
    handles: list[RemovableHandle] = [module.register_forward_hook(run, with_kwargs=True)]
    wide_input = piece.wide_input
    if wide_input is not None:

        def narrow(*given: Any) -> Any:
            return meter.timed(wide_input.narrow, *given)

        handles.append(module.register_forward_pre_hook(narrow, with_kwargs=True))
    elif piece.turns_inputs:
        turn = _turn(piece, meter, rescue, name)
        handles.append(module.register_forward_pre_hook(turn, with_kwargs=True))

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return Attached(weakref.ref(module), piece, detach)


def take_off(attached: dict[str, Attached], names: Iterable[str]) -> None:
    """Take these off, each; what is interrupted can be done again."""

    def detach(name: str) -> None:
        try:
            attached[name].detach()
        except Exception:
            del attached[name]
            raise
        del attached[name]

    run_all([partial(detach, name) for name in names])


def put_back_parameters(attached: dict[str, Attached]) -> None:
    """What a session that nobody holds any more still owes its model."""
    take_off(attached, [name for name, here in attached.items() if shadows_of(here.piece)])


def _hook(branch: Branch, meter: OverheadMeter, rescue: Rescue, name: str) -> Callable[..., Tensor]:
    def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        given = x
        if branch.wide_input is not None:
            x = branch.wide_input.take()
        elif branch.given is not None:
            x = branch.given
        if torch.compiler.is_compiling() or rescue.listener is None:
            return meter.timed(beside, branch, module, x, output)
        try:
            return meter.timed(beside, branch, module, x, output)
        except Exception as error:  # noqa: BLE001  a device can fail in any way
            own = args, kwargs
            if branch.wide_input is None and x is not given:
                own = with_input(x, args, kwargs)
            return rescue.output(name, module, x, lambda: module.forward(*own[0], **own[1]), error)

    return run


def _turn(branch: Branch, meter: OverheadMeter, rescue: Rescue, name: str) -> Callable[..., Any]:
    """A forward pre-hook: the module's first argument becomes the turned one, in a tensor of its own."""

    def run(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        if torch.compiler.is_compiling() or rescue.listener is None:
            turned = meter.timed(branch.turned, x)
        else:
            try:
                turned = meter.timed(branch.turned, x)
            except Exception as error:  # noqa: BLE001  a device can fail in any way
                logger.warning("layer %s: its input is turned in a second pass instead: %s", name, error)
                return None
        return None if turned is None else with_input(turned, args, kwargs)

    return run


def same_structure(present: Piece, wanted: Piece) -> bool:
    """Whether one becomes the other by an exchange of strengths."""
    if isinstance(present, Shadow) or isinstance(wanted, Shadow):
        return False
    return present.structure() == wanted.structure()


def restrength(present: Piece, wanted: Piece, undo: Undo) -> None:
    """Give what stands the strengths of another piece of equal structure."""
    assert not isinstance(present, Shadow)
    if isinstance(present, Merged) and isinstance(wanted, Merged) and present.equals(wanted):
        return
    state = dict(vars(present))

    def restore() -> None:
        vars(present).update(state)
        if isinstance(present, Merged):
            present.write()

    undo.append(restore)
    present.restrength(wanted)  # type: ignore[arg-type]


def branch_at(attached: Mapping[str, Attached], name: str) -> Branch | None:
    """What runs beside the module of this name, if anything does."""
    piece = attached[name].piece if name in attached else None
    return None if isinstance(piece, Shadow | Merged) else piece


def shadows_of(piece: Piece) -> tuple[Shadow, ...]:
    """The parameters that stand in the place of the host's."""
    if isinstance(piece, Merged):
        return piece.shadows
    return (piece,) if isinstance(piece, Shadow) else ()
