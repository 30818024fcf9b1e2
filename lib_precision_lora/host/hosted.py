"""A session that follows the patches of one of the host's models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lib_precision_lora.branch import (
    DensePolicy,
    EffectiveWeight,
    Patch,
    PatchError,
    PatchMemoryError,
    PatchSession,
)
from lib_precision_lora.branch.fitted import FittedAdapters
from lib_precision_lora.branch.footprint import Footprint
from lib_precision_lora.branch.overhead import OverheadMeter
from lib_precision_lora.branch.sites import Site
from lib_precision_lora.host.division import Division, HostPatches, flat, source_of, unreadable
from lib_precision_lora.host.progress import Interrupted
from lib_precision_lora.host.settings import Arithmetic
from lib_precision_lora.memory.allocator import allocated_bytes
from lib_precision_lora.ticks import Tick, untold

logger = logging.getLogger("lib_precision_lora")


class AttachInterrupted(PatchError):
    """A source that the user did not wait for: nothing is wrong with it."""


class StillMerged(PatchError):
    """The host could not take out what it had merged: no file's fault, and tried again at each occasion."""


class HostedSession:
    """Keeps one model's branches equal to what the host's patch dictionary says.

    A parameter all of whose patches are understood is ours; any other goes the host's own way, whole.
    host_layers: source → how many of its parameters that are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._session = PatchSession(model, timed="diffusion_model")
        self._signature: object = None
        self._values: list[Any] = []
        self._division = Division()
        self._theirs: object = None
        self.host_layers: dict[str, int] = {}
        self._problems: list[PatchError] = []
        self._sketched: tuple[object, Mapping[str, Footprint]] | None = None
        self._fitted: FittedAdapters | None = None

    def aside(self, model: nn.Module, stock_dora_norm: bool) -> HostedSession:
        """One for the `footprints` of patches that are not to be attached: it sees what stands in the model,
        and keeps what it makes to itself."""
        other = HostedSession(model)
        other._session, other._fitted = self._session, FittedAdapters()
        other._division = Division(stock_dora_norm)
        return other

    def follow(
        self,
        model: nn.Module,
        host_patches: HostPatches,
        arithmetic: Arithmetic,
        merge: Callable[[HostPatches], None],
        tick: Tick = untold,
    ) -> Sequence[PatchError]:
        """Bring the model to these patches; nothing happens where nothing has changed.

        merge: the host's own way, given the patches that are not ours, to be done whether or not their
        identifiers are those of the last time. Returns the reason for each source that is left out; where
        tick raises `Interrupted`, all of them are.
        """
        signature = arithmetic, *flat(host_patches)
        if signature == self._signature:
            return self._problems
        self._signature = None
        self._division.take_norm_of(arithmetic.stock_dora_norm)
        problems: list[PatchError] = []
        try:
            self._bring(model, host_patches, arithmetic, merge, tick, problems)
        except Interrupted:
            problems += self._take_off(host_patches, {problem.source for problem in problems}, merge)
        if self._theirs is None:
            problems.append(
                StillMerged("the WebUI could not take out what it had merged; load the checkpoint anew")
            )
        self._problems = problems
        self._signature = None if self._theirs is None else signature
        self._values = [
            entry[1] for patches in host_patches.values() for stack in patches.values() for entry in stack
        ]
        return self._problems

    def footprints(
        self,
        model: nn.Module,
        host_patches: HostPatches,
        arithmetic: Arithmetic,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Mapping[str, Footprint]:
        """What each module's branch would take, of these patches. Raises `PatchError` as attaching does."""
        signature = arithmetic, device, dtype, *flat(host_patches)
        if self._sketched is None or self._sketched[0] != signature:
            ours, _ = self._division.divide(model, host_patches)
            sketched = self._session.footprints(
                ours, arithmetic.compute, device, dtype, _policy(model, arithmetic), self._fitted
            )
            self._sketched = signature, sketched
        return self._sketched[1]

    def place(
        self,
        device: torch.device,
        dtype: torch.dtype,
        resident: frozenset[str] | None,
        tick: Tick = untold,
    ) -> None:
        """Bring the factors to where forwards expect them (`PatchSession.place`)."""
        self._session.place(device, dtype, resident, tick)

    @property
    def placed_bytes(self) -> int:
        """Of factors that stand on the device, as its allocator rounds them."""
        return allocated_bytes(self._session.placed_sizes)

    @property
    def streamed_bytes(self) -> int:
        """Of factors that wait in RAM for each forward, as a device's allocator would round them."""
        return allocated_bytes(self._session.streamed_sizes)

    @property
    def overhead(self) -> OverheadMeter:
        """What branches cost in a forward of the diffusion model."""
        return self._session.overhead

    def clear(self) -> None:
        """Take off everything that is ours; what the host has merged is the host's to take out."""
        self._session.clear()
        self._signature = self._theirs = self._sketched = None
        self._values.clear()
        self._division.clear()
        self.host_layers = {}
        self._problems = []

    def try_again(self) -> None:
        """Where something was left out, try it once more at the next occasion."""
        if self._problems:
            self._signature = None

    def release(self) -> None:
        """The host takes the model off its device: the factors go too, until the next forward."""
        self._session.release()

    def unmerge(self) -> None:
        """Let the host find its own parameters where it places them one by one; `follow` merges again."""
        if self._session.merged:
            self._signature = None
            self._session.clear_merged()

    def effective(self) -> Mapping[str, tuple[Site, EffectiveWeight]]:
        """What is attached, by parameter (`PatchSession.effective`)."""
        return self._session.effective()

    @property
    def sources(self) -> tuple[str, ...]:
        """The files that are attached, in prompt order."""
        patches = (patch for patch in self._session.patches if not patch.changes_nothing)
        return tuple(dict.fromkeys(patch.source for patch in patches))

    @property
    def attached(self) -> tuple[str, ...]:
        return self._session.attached

    @property
    def merged(self) -> tuple[str, ...]:
        return self._session.merged

    def _bring(
        self,
        model: nn.Module,
        host_patches: HostPatches,
        arithmetic: Arithmetic,
        merge: Callable[[HostPatches], None],
        tick: Tick,
        problems: list[PatchError],
    ) -> None:
        """The host's part first, then ours. Where one part of a source fails, the other is taken off again;
        the reason goes to the problems, of which one without a source is everybody's."""
        while True:
            left_out = {problem.source for problem in problems}
            left = {} if None in left_out else host_patches
            left = {key: patches for key, patches in left.items() if source_of(key) not in left_out}
            ours, theirs = self._division.divide(model, left)
            failed = unreadable(theirs)
            if not failed and flat(theirs) != self._theirs:
                self._session.clear()
                failed = self._merge(theirs, merge)
            if not failed:
                failed = self._apply(model, ours, arithmetic, tick)
                if not failed or not theirs:
                    problems += failed
                    self.host_layers = {source_of(key): len(patches) for key, patches in theirs.items()}
                    return
            problems += failed

    def _merge(self, theirs: HostPatches, merge: Callable[[HostPatches], None]) -> list[PatchError]:
        """Have the host merge its part. Where it fails, it takes all of it out again, and every source of
        it is left out."""
        self._theirs = None
        try:
            merge(theirs)
        except Exception as error:
            logger.exception("the WebUI's own merge failed")
            try:
                merge({})
            except Exception:
                logger.exception("taking the failed merge out failed as well; reload the checkpoint")
            reason = f"the WebUI's own merge failed ({type(error).__name__}: {error})"
            sources = dict.fromkeys(source_of(identifier) for identifier in theirs)
            return [PatchError(f"{source}: {reason}", source) for source in sources]
        self._theirs = flat(theirs)
        return []

    def _take_off(
        self, host_patches: HostPatches, left_out: set[str | None], merge: Callable[[HostPatches], None]
    ) -> list[AttachInterrupted]:
        """Leave the model without any LoRA, be it of these patches or of the former ones."""
        self._session.clear()
        if self._theirs:
            self._merge({}, merge)
        self.host_layers = {}
        reason = "the generation was interrupted while it was being attached; the next one attaches it"
        sources = dict.fromkeys(source_of(identifier) for identifier in host_patches)
        return [AttachInterrupted(f"{each}: {reason}", each) for each in sources if each not in left_out]

    def _apply(
        self, model: nn.Module, patches: list[Patch], arithmetic: Arithmetic, tick: Tick
    ) -> list[PatchError]:
        """Attach as many sources as can be; each that fails is left out whole. Where a stack fails and not
        one of its parts, the last of them goes first."""
        problems: list[PatchError] = []
        dense, released = _policy(model, arithmetic), False
        while True:
            try:
                self._session.apply_patches(patches, arithmetic.compute, dense, tick)
                if self._session.merged:
                    logger.info("%d layers are merged", len(self._session.merged))
                return problems
            except PatchError as error:
                if isinstance(error, PatchMemoryError) and not released:
                    logger.warning("%s; trying once more with the factors of all layers in RAM", error)
                    self._session.release()
                    released = True
                    continue
                source = error.source or _last_source(patches, error.parameter)
                message = str(error) if error.source is not None else f"{source or 'all of them'}: {error}"
                # a new error: the raised one's traceback would keep the model alive
                problems.append(PatchError(message, source))
                patches = [patch for patch in patches if source is not None and patch.source != source]
            except Interrupted:
                raise
            except Exception:
                logger.exception("attaching LoRAs failed; they are tried one after the other")
                problem = self._first_that_fails(patches, arithmetic, dense, tick)
                if problem is None:
                    return problems
                problems.append(problem)
                patches = [patch for patch in patches if patch.source != problem.source]

    def _first_that_fails(
        self, patches: Sequence[Patch], arithmetic: Arithmetic, dense: DensePolicy, tick: Tick
    ) -> PatchError | None:
        """Whose a failure is that does not say so: the first source that cannot be attached after those
        before it. None where all can, which then are."""
        self._session.clear()
        sources = list(dict.fromkeys(patch.source for patch in patches))
        for count, source in enumerate(sources, 1):
            some = [patch for patch in patches if patch.source in sources[:count]]
            try:
                self._session.apply_patches(some, arithmetic.compute, dense, tick)
            except Interrupted:
                raise
            except Exception as error:
                logger.exception("attaching %s failed", source)
                self._session.clear()
                reason = f"attaching failed ({type(error).__name__}: {error})"
                return PatchError(f"{source}: {reason}; please report it with the console's log", source)
        return None


def _policy(model: nn.Module, arithmetic: Arithmetic) -> DensePolicy:
    """A weight that is cast to bf16 in every forward would lose there what was merged into it."""
    return "branch" if getattr(model, "computation_dtype", None) == torch.bfloat16 else arithmetic.dense


def _last_source(patches: Sequence[Patch], place: str | None) -> str | None:
    """The last source that patches this parameter, or one of this module; None where there is none."""
    here = [
        patch.source
        for patch in patches
        if place is not None and place in (patch.target.parameter, patch.target.parameter.rpartition(".")[0])
    ]
    return here[-1] if here else None
