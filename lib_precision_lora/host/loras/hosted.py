"""A session that follows the patches of one of the host's models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lib_precision_lora.branch import (
    Compute,
    DensePolicy,
    EffectiveWeight,
    Patch,
    PatchError,
    PatchMemoryError,
    PatchSession,
)
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.branch.session.overhead import OverheadMeter
from lib_precision_lora.branch.session.planning.footprint import Footprint
from lib_precision_lora.branch.session.planning.policy import process_device
from lib_precision_lora.branch.session.rescue import Rescue, Trial
from lib_precision_lora.branch.session.sites import Site
from lib_precision_lora.host.generation.progress import Interrupted
from lib_precision_lora.host.loras.blame import blamed, problem_of
from lib_precision_lora.host.loras.division import Division, HostPatches, flat, only, source_of, unreadable
from lib_precision_lora.host.loras.matching import PutAside, nothing_aside
from lib_precision_lora.host.loras.planned_strengths import at_planned_strength
from lib_precision_lora.host.page.settings import Arithmetic
from lib_precision_lora.memory.allocator import allocated_bytes
from lib_precision_lora.ticks import Tick, untold

logger = logging.getLogger("lib_precision_lora")


class AttachInterrupted(PatchError):
    """A source that the user did not wait for: nothing is wrong with it."""


class StillMerged(PatchError):
    """The host could not take out what it had merged: no file's fault, and tried again at each occasion."""


class MergeError(PatchError):
    """The host could not merge its part. suspects: whose patches that was, those that it alone understands
    last: they are to blame sooner than what we could have attached."""

    def __init__(self, message: str, suspects: Sequence[str]) -> None:
        super().__init__(message)
        self.suspects = tuple(suspects)


class HostedSession:
    """Keeps one model's branches equal to what the host's patch dictionary says.

    A parameter all of whose patches are understood is ours; any other goes the host's own way, whole.
    aside: what the host has put aside of the model; host_layers: source → how many of its parameters go the
    host's own way; runs_on: as `PatchSession` has it.
    """

    def __init__(
        self,
        model: nn.Module,
        aside: PutAside = nothing_aside,
        runs_on: Callable[[], torch.device] = process_device,
    ) -> None:
        self._aside = aside
        self._session = PatchSession(model, timed="diffusion_model", runs_on=runs_on)
        self._signature: object = None
        self._values: list[Any] = []
        self._division = Division(aside=aside)
        self._theirs: object = None
        self.host_layers: dict[str, int] = {}
        self._problems: list[PatchError] = []
        self._failed: dict[str, PatchError] = {}
        self._mode: tuple[Compute, DensePolicy] = ("auto", "branch")
        self._sketched: tuple[object, Mapping[str, Footprint]] | None = None
        self._fitted: FittedAdapters | None = None

    def aside(self, model: nn.Module, stock_dora_norm: bool) -> HostedSession:
        """One for the `footprints` of patches that are not to be attached: it sees what stands in the model,
        and keeps what it makes to itself."""
        other = HostedSession(model, self._aside)
        other._session, other._fitted = self._session, FittedAdapters()
        other._division = Division(stock_dora_norm, self._aside)
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
        problems = list(self._failed.values())

        def attempt(patches: HostPatches) -> None:
            self._attempt(model, patches, arithmetic, merge, tick)

        try:
            self._bring(host_patches, attempt, problems)
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
        """What each module's branch would take, of these patches, found once for all strengths of additions.

        Raises `PatchError` as attaching does.
        """
        asked = host_patches, at_planned_strength(host_patches)
        signatures = [(arithmetic, device, dtype, *flat(patches)) for patches in asked]
        if self._sketched is None or self._sketched[0] not in signatures:
            mode = arithmetic.compute, device, dtype, _policy(model, arithmetic), self._fitted
            (given, exact), (planned, every) = zip(asked, signatures, strict=True)
            try:
                self._sketched = every, self._session.footprints(self._ours(model, planned), *mode)
            except PatchError:
                self._sketched = exact, self._session.footprints(self._ours(model, given), *mode)
        return self._sketched[1]

    def leave_out(self, error: Exception, trial: Trial | None) -> bool:
        """Something has failed after it was attached: the next `follow` leaves out the source that is to
        blame, until `try_again`.

        trial: does again what has failed, with what is attached by then; None: everything that is attached
        where the error came up is to blame. Returns whether there is such a source; where there is none, all
        are attached, and the trial has succeeded.
        """
        patches, parameter = self._session.patches, getattr(error, "parameter", None)
        sources = list(dict.fromkeys(patch.source for patch in patches if not patch.changes_nothing))
        concerned = {patch.source for patch in patches if _at(patch.target.parameter, parameter)}
        suspects = [source for source in sources if source in concerned] or sources

        def attempt(some: Sequence[str]) -> None:
            left = [patch for patch in patches if patch.source in some or patch.source not in suspects]
            self._apply(left, *self._mode, untold)
            try:
                if trial is not None:
                    trial()
            except (PatchError, Interrupted):
                raise
            except Exception as failure:
                raise PatchError(str(error), None, parameter) from failure

        self._signature = None
        if trial is None:
            problems = [problem_of(error, source) for source in suspects]
        else:
            problem = blamed(error, suspects, attempt)
            problems = [] if problem is None else [problem]
        self._failed |= {problem.source: problem for problem in problems if problem.source is not None}
        return bool(problems)

    @property
    def failed(self) -> frozenset[str]:
        """The sources that were left out because they failed."""
        problems = (each for each in self._problems if not isinstance(each, AttachInterrupted))
        return frozenset(problem.source for problem in problems if problem.source is not None)

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

    @property
    def rescue(self) -> Rescue:
        """What goes on where a branch fails in a forward."""
        return self._session.rescue

    def clear(self) -> None:
        """Take off everything that is ours; what the host has merged is the host's to take out."""
        self._signature = self._theirs = self._sketched = None
        self._values.clear()
        self._division.clear()
        self.host_layers = {}
        self._problems = []
        self._failed.clear()
        self._session.clear()

    def try_again(self) -> None:
        """Where something was left out, try it once more at the next occasion."""
        if self._problems or self._failed:
            self._signature = None
        self._problems = []
        self._failed.clear()

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
        host_patches: HostPatches,
        attempt: Callable[[HostPatches], None],
        problems: list[PatchError],
    ) -> None:
        """Attempt all sources but those of the problems, and with each failure one less; the reasons go to
        the problems."""
        sources = list(dict.fromkeys(source_of(identifier) for identifier in host_patches))
        while True:
            left = [source for source in sources if source not in {problem.source for problem in problems}]
            try:
                attempt(only(host_patches, left))
                return
            except Interrupted:
                raise
            except Exception as error:
                if not left:
                    raise
                suspects = self._suspects(error, host_patches, left)
                others = [source for source in left if source not in suspects]
                if not isinstance(error, PatchError) or error.source is None:
                    self._session.clear()
                problem = blamed(
                    error, suspects, lambda some, others=others: attempt(only(host_patches, [*others, *some]))
                )
            if problem is None:
                return
            problems.append(problem)

    def _suspects(self, error: Exception, host_patches: HostPatches, sources: list[str]) -> list[str]:
        """The sources that may be to blame, of these: those that the error is about, where it says so."""
        if isinstance(error, MergeError):
            return list(error.suspects)
        parameter = error.parameter if isinstance(error, PatchError) else None
        names = {source: set[str]() for source in sources}
        for identifier, patches in host_patches.items():
            if source_of(identifier) in names:
                names[source_of(identifier)] |= patches.keys()
        here = [source for source in sources if any(_at(name, parameter) for name in names[source])]
        return here or sources

    def _attempt(
        self,
        model: nn.Module,
        host_patches: HostPatches,
        arithmetic: Arithmetic,
        merge: Callable[[HostPatches], None],
        tick: Tick,
    ) -> None:
        """The host's part first, then ours. Raises where a part of it fails.

        A patch of ours that the host cannot read beside its own is refused only where the host could merge
        that own one.
        """
        ours, theirs = self._division.divide(model, host_patches)
        refused = unreadable(theirs)
        sources = dict.fromkeys(source_of(identifier) for identifier in theirs)
        mergeable = only(theirs, sources.keys() - {problem.source for problem in refused})
        if flat(mergeable) != self._theirs:
            self._session.clear()
            self._merge(mergeable, merge, self._division.suspects(theirs))
        if refused:
            raise refused[0]
        self._apply(ours, arithmetic.compute, _policy(model, arithmetic), tick)
        self.host_layers = {source_of(key): len(patches) for key, patches in theirs.items()}

    def _ours(self, model: nn.Module, host_patches: HostPatches) -> list[Patch]:
        return self._division.divide(model, host_patches)[0]

    def _merge(
        self, theirs: HostPatches, merge: Callable[[HostPatches], None], suspects: Sequence[str] = ()
    ) -> None:
        """Have the host merge its part. Where it fails, it takes all of it out again.

        Raises `MergeError` for what it could not merge; where it could not take out, `_theirs` stays None.
        """
        self._theirs = None
        try:
            merge(theirs)
        except Exception as error:
            logger.exception("the WebUI's own merge failed")
            try:
                merge({})
            except Exception:
                logger.exception("taking the failed merge out failed as well; reload the checkpoint")
            if not theirs:
                return
            reason = f"the WebUI's own merge failed ({type(error).__name__}: {error})"
            present = {source_of(identifier) for identifier in theirs}
            raise MergeError(reason, [source for source in suspects if source in present]) from error
        self._theirs = flat(theirs)

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

    def _apply(self, patches: Sequence[Patch], compute: Compute, dense: DensePolicy, tick: Tick) -> None:
        """Attach these; where a device has no memory, once more with the factors of all layers in RAM."""
        self._mode = compute, dense
        try:
            self._session.apply_patches(patches, compute, dense, tick)
        except PatchMemoryError as error:
            logger.warning("%s; trying once more with the factors of all layers in RAM", error)
            self._session.release()
            self._session.apply_patches(patches, compute, dense, tick)
        if self._session.merged:
            logger.info("%d layers are merged", len(self._session.merged))


def _policy(model: nn.Module, arithmetic: Arithmetic) -> DensePolicy:
    """A weight that is cast to bf16 in every forward would lose there what was merged into it."""
    return "branch" if getattr(model, "computation_dtype", None) == torch.bfloat16 else arithmetic.dense


def _at(name: Any, parameter: str | None) -> bool:
    """Whether a parameter's name is this one, or that of a part of this module."""
    return parameter is not None and parameter in (str(name), str(name).rpartition(".")[0])
