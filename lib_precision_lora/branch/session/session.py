"""The session: attaches a patch set to a model, changes it, and takes it off again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import TracebackType

import torch
from torch import nn

from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.branch.algebra.sketch import SketchedWeight
from lib_precision_lora.branch.arithmetic.chunks import Arithmetic
from lib_precision_lora.branch.arithmetic.product import Compute
from lib_precision_lora.branch.forward.shadow import Shadow
from lib_precision_lora.branch.forward.streaming import FactorStream
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.session.attach import (
    Attached,
    attach,
    branch_at,
    put_back_parameters,
    restrength,
    same_structure,
    shadows_of,
    take_off,
)
from lib_precision_lora.branch.session.compose import (
    Piece,
    effective_weights,
    make_attachments,
    memory_for,
    merged_modules,
    out_of_memory,
    piece_bytes,
)
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.branch.session.merged import Merged, NotRepresentable
from lib_precision_lora.branch.session.overhead import OverheadMeter
from lib_precision_lora.branch.session.patch import Applied, Patch, PatchError, PatchItem, resolve
from lib_precision_lora.branch.session.planning.footprint import Footprint, footprints
from lib_precision_lora.branch.session.planning.policy import DensePolicy, process_device, steps_on_a_card
from lib_precision_lora.branch.session.rescue import Rescue
from lib_precision_lora.branch.session.sites import Site
from lib_precision_lora.branch.session.strengths import exchange_strengths
from lib_precision_lora.branch.session.undo import Undo, run_all, run_back
from lib_precision_lora.ticks import Step, Steps, Tick, untold

logger = logging.getLogger(__name__)


class PatchSession:
    """Runs a patch set beside the modules of one model.

    `apply` is all or nothing. What stays the same from one set to the next stays attached: a change of
    strength exchanges a few numbers per layer. The session refers to the model weakly, and the model to
    the session not at all. When it is gone, so are the parameters that stood in for the host's;
    hooks stay until `clear`.

    timed: the name of the model's part of which one forward is a step; runs_on: asked for the device on
    which models run, which a program may choose beside a card that is there; overhead: what branches cost in
    a step; rescue: what goes on where one fails in a forward.
    """

    def __init__(
        self,
        model: nn.Module,
        timed: str | None = None,
        runs_on: Callable[[], torch.device] = process_device,
    ) -> None:
        self._model = weakref.ref(model)
        self._timed = timed
        self._runs_on = runs_on
        self.overhead = OverheadMeter()
        self._attached: dict[str, Attached] = {}
        self.rescue = Rescue(partial(branch_at, self._attached))
        weakref.finalize(self, put_back_parameters, self._attached).atexit = False
        self._fitted = FittedAdapters()
        self._memo = Memo()
        self._stream = FactorStream()
        self._patches: tuple[Patch, ...] = ()
        self._mode: tuple[Compute, DensePolicy] | None = None

    def apply(
        self, items: Sequence[PatchItem], compute: Compute = "auto", dense: DensePolicy = "branch"
    ) -> Applied:
        """Attach these files, each `(name, adapters, strength)`, in this order, instead of the former set.

        dense: whether dense fp16 and fp32 layers are merged instead; `policy.py` has the rule.
        Raises `PatchError` (file, layer and numbers) and leaves everything as it was.
        """
        patches, applied = resolve(self._living_model(), items)
        self.apply_patches(patches, compute, dense)
        return applied

    def apply_patches(
        self,
        patches: Sequence[Patch],
        compute: Compute = "auto",
        dense: DensePolicy = "branch",
        tick: Tick = untold,
    ) -> None:
        """`apply`, for patches whose parameters are resolved already.

        tick: what it raises leaves everything as it was, too; what was read from the base until then is kept
        for the next time.
        """
        self._stream.forget()
        mode = compute, dense
        if mode == self._mode and exchange_strengths(
            self._living_model(), self._attached, self._patches, patches, self._memo, tick
        ):
            self._memo.keep_all()
            self._patches = tuple(patches)
            return
        undo: Undo = []
        # each patch is read once; each parameter is made ready once, and put in its place
        step = Steps(len(patches) + 2 * len({patch.target.parameter for patch in patches}), tick)
        before = dict(self._attached)
        try:
            for name, here in before.items():
                if isinstance(here.piece, Merged) and not here.piece.stands:
                    self._remove(name, undo)
            wanted = self._wanted(patches, compute, dense, step)
            for name in [name for name in self._attached if name not in wanted]:
                self._remove(name, undo)
            for name, (site, piece) in wanted.items():
                step()
                with memory_for(name, piece_bytes(piece)):
                    self._put(name, site.module, piece, undo)
            self.overhead.watch(self._timed_module())
        except BaseException:
            run_back(undo)
            raise
        self._fitted.keep_used()
        self._memo.keep_used()
        self._patches, self._mode = tuple(patches), mode

    def clear(self) -> None:
        """Take everything off; the model's parameters are the objects they were. Each part of it is done,
        whichever other one fails."""
        self._patches = ()
        run_all(
            [
                self._stream.forget,
                partial(self.overhead.watch, None),
                partial(take_off, self._attached, list(self._attached)),
            ]
        )

    def clear_merged(self) -> None:
        """Take off what is merged, alone; the next `apply` merges it again."""
        take_off(self._attached, self.merged)

    def release(self) -> None:
        """Let go of all factors on devices; the next forward places them again. Merged layers stay."""
        self._stream.forget()
        for attached in self._attached.values():
            if not isinstance(attached.piece, Shadow | Merged):
                attached.piece.release()

    def footprints(
        self,
        patches: Sequence[Patch],
        compute: Compute,
        device: torch.device,
        dtype: torch.dtype,
        dense: DensePolicy = "branch",
        fitted: FittedAdapters | None = None,
    ) -> dict[str, Footprint]:
        """What each module's branch would take on this device, for activations of this type, by name.

        What is merged takes the place of the base, and nothing more. Nothing is placed, attached, or read
        from the base. fitted: where adapters that are made to fit are kept, with those of the attached set
        where None. Raises `PatchError` as `apply_patches` does.
        """
        model = self._living_model()
        fitted = self._fitted if fitted is None else fitted
        shadows = self._standing_shadows()
        weights = effective_weights(model, patches, fitted, shadows, begin=SketchedWeight)
        merged = merged_modules(model, weights, compute, dense, self._on_a_card())
        return footprints(weights, Arithmetic.of(compute, device, dtype), merged)

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The set that was applied last."""
        return self._patches

    def effective(self) -> dict[str, tuple[Site, EffectiveWeight]]:
        """W_eff of every parameter that the applied set changes, by name; it holds the memory of the base.

        Of what is shadowed or merged, the base is the original, and so is the site's parameter.
        """
        shadows = self._standing_shadows()
        return effective_weights(self._living_model(), self._patches, self._fitted, shadows, self._memo)

    def place(
        self,
        device: torch.device,
        dtype: torch.dtype,
        resident: Collection[str] | None = None,
        tick: Tick = untold,
    ) -> None:
        """Bring the factors to where forwards on this device, with activations of this type, expect them.

        resident: the modules whose factors stay on the device, all where None; the others' stay in RAM and
        are streamed. Raises `PatchMemoryError`, with layer and bytes, where there is no memory, and
        `PatchError`, with the layer, for any other failure; the device then holds no factors at all. tick:
        what it raises leaves the rest to their next forward.
        """
        device = torch.empty(0, device=device).device  # with the index that inputs have
        pieces = [(name, here.piece) for name, here in self._attached.items()]
        branches = [(name, p) for name, p in pieces if isinstance(p, WeightBranch) and p.placeable]
        step = Steps(len(branches), tick)
        for name, branch in branches:
            branch.spare = self._stream
            branch.reside(None if resident is None or name in resident else self._stream)
        for name, branch in branches:
            step()
            branch.spare = None  # here the whole set falls back, by the caller, or none of it
            try:
                branch.place(device, dtype)
            except torch.cuda.OutOfMemoryError as error:
                self.release()
                raise out_of_memory(name, branch.factor_bytes, error) from error
            except Exception as error:
                self.release()
                reason = f"placing its factors on {device} failed ({type(error).__name__}: {error})"
                raise PatchError(f"layer {name}: {reason}", None, name) from error
            finally:
                branch.spare = self._stream

    @property
    def streamed(self) -> tuple[str, ...]:
        """The modules whose factors stay in RAM."""
        return tuple(name for name, piece in self._pieces() if _is_streamed(piece))

    @property
    def placed_sizes(self) -> tuple[int, ...]:
        """Bytes of each piece of memory that holds factors where forwards expect them; streamed ones do
        not."""
        return self._sizes(streamed=False)

    @property
    def streamed_sizes(self) -> tuple[int, ...]:
        """Bytes of each piece of memory that holds factors in RAM, to be streamed."""
        return self._sizes(streamed=True)

    def _sizes(self, streamed: bool) -> tuple[int, ...]:
        sizes: dict[int, int] = {}
        for _, piece in self._pieces():
            if _is_streamed(piece) != streamed:
                continue
            for tensor in piece.placed():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tuple(sizes.values())

    def _pieces(self) -> list[tuple[str, Piece]]:
        """What stands where at this moment, for readers: they may be in another thread than the one that
        attaches."""
        return [(name, here.piece) for name, here in list(self._attached.items())]

    @property
    def placed_bytes(self) -> int:
        return sum(self.placed_sizes)

    @property
    def merged(self) -> tuple[str, ...]:
        """The modules that are merged, as opposed to run beside."""
        return tuple(name for name, piece in self._pieces() if isinstance(piece, Merged))

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

    def _timed_module(self) -> nn.Module | None:
        """The module whose forwards are measured: none where nothing runs beside another."""
        beside = any(not isinstance(here.piece, Shadow | Merged) for here in self._attached.values())
        return self._stepped() if beside else None

    def _stepped(self) -> nn.Module | None:
        """The model's part of which one forward is a step."""
        module = getattr(self._living_model(), self._timed, None) if self._timed else None
        return module if isinstance(module, nn.Module) else None

    def _on_a_card(self) -> bool:
        return steps_on_a_card(self._stepped(), self._runs_on())

    def _standing_shadows(self) -> list[Shadow]:
        """What stands in the place of the host's parameters."""
        return [shadow for here in self._attached.values() for shadow in shadows_of(here.piece)]

    def _wanted(
        self, patches: Sequence[Patch], compute: Compute, dense: DensePolicy, step: Step
    ) -> dict[str, tuple[Site, Piece]]:
        """What should stand where. The effective weights, which hold the memory of the base, end here."""
        model = self._living_model()
        shadows = self._standing_shadows()
        weights = effective_weights(model, patches, self._fitted, shadows, self._memo, step=step)
        return make_attachments(model, weights, compute, dense, step, self._on_a_card())

    def _put(self, name: str, module: nn.Module, piece: Piece, undo: Undo) -> None:
        """Bring one place from what stands there to `piece`, and say how to undo it."""
        try:
            self._place(name, module, piece, undo)
        except NotRepresentable:
            assert isinstance(piece, Merged)
            logger.info("%s runs beside its weight: merged, it would leave its type's range", name)
            self._place(name, module, piece.branch, undo)

    def _place(self, name: str, module: nn.Module, piece: Piece, undo: Undo) -> None:
        present = self._attached.get(name)
        if present is not None and present.module() is module and same_structure(present.piece, piece):
            restrength(present.piece, piece, undo)
            return
        if present is not None:
            self._remove(name, undo)
        self._attached[name] = attach(module, piece, self.overhead, self.rescue, name)
        undo.append(lambda: self._attached.pop(name).detach())

    def _remove(self, name: str, undo: Undo) -> None:
        gone = self._attached[name]

        def put_back() -> None:
            gone.detach()  # in case it was interrupted the first time
            module = gone.module()
            if module is not None:
                self._attached[name] = attach(module, gone.piece, self.overhead, self.rescue, name)

        undo.append(put_back)
        gone.detach()
        del self._attached[name]


def _is_streamed(piece: Piece) -> bool:
    return isinstance(piece, WeightBranch) and piece.stream is not None
