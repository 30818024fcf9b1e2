"""From a list of patches to the branches and shadows that a model needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from lib_precision_lora.adapters import AdapterError, channels_of
from lib_precision_lora.adapters.adapter import adapter_bytes
from lib_precision_lora.branch.algebra.effective import EffectiveWeight
from lib_precision_lora.branch.algebra.memo import Memo
from lib_precision_lora.branch.arithmetic.product import Compute
from lib_precision_lora.branch.forward.branch import Branch
from lib_precision_lora.branch.forward.conv import ConvBranch, require_conv_form
from lib_precision_lora.branch.forward.embedding import EmbeddingBranch
from lib_precision_lora.branch.forward.linear import LinearBranch
from lib_precision_lora.branch.forward.norm import NormBranch
from lib_precision_lora.branch.forward.operands import factor_bytes
from lib_precision_lora.branch.forward.shadow import Shadow, make_shadow
from lib_precision_lora.branch.forward.weight_branch import WeightBranch
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.branch.session.merged import Merged, make_merged
from lib_precision_lora.branch.session.patch import Patch, PatchError, PatchMemoryError
from lib_precision_lora.branch.session.planning.policy import DensePolicy, merges, shared
from lib_precision_lora.branch.session.sites import Site, find_site
from lib_precision_lora.storage import StorageError, StoredWeight, stored_weight, widened
from lib_precision_lora.ticks import Step, uncounted

Piece = Branch | Shadow | Merged
"""What stands at a module, or at a parameter."""


class WeightBranchKind(Protocol):
    """Linear, conv or embedding: made from the effective weight and bias of one module."""

    def __call__(self, weight: EffectiveWeight, bias: EffectiveWeight | None, compute: Compute) -> Branch: ...


WEIGHT_BRANCHES: Mapping[str, WeightBranchKind] = {
    "linear": LinearBranch,
    "conv": ConvBranch,
    "embedding": EmbeddingBranch,
}


def effective_weights(
    model: nn.Module,
    patches: Iterable[Patch],
    fitted: FittedAdapters,
    shadows: Iterable[Shadow] = (),
    memo: Memo | None = None,
    begin: type[EffectiveWeight] = EffectiveWeight,
    step: Step = uncounted,
) -> dict[str, tuple[Site, EffectiveWeight]]:
    """The effective weight of every parameter that a patch changes, by name.

    fitted: the adapters that former stacks have made to fit; shadows: those that stand in the model now;
    memo: what former stacks have read from the base; begin: the kind of effective weight, real or a sketch;
    step: told before each patch, whose norms and products are read from the base then.
    Raises `PatchError`, naming file and layer, for a patch that does not fit, or for which there is no
    memory.
    """
    patches = [patch for patch in patches if not patch.changes_nothing]
    stored: dict[str, tuple[Site, StoredWeight]] = {}
    for patch in patches:
        with _blamed(patch):
            stored[patch.target.parameter] = _stored(model, patch, stored, shadows)
    weights = {name: (site, begin.identity(base, memo, name)) for name, (site, base) in stored.items()}
    for patch in patches:
        step()
        with _blamed(patch):
            site, running = weights[patch.target.parameter]
            if patch.base_factor != 1.0:
                running = running.scaled(patch.base_factor, patch.target.rows)
            adapter = fitted.adapter(patch, running.stored)
            running = running.apply(adapter, patch.strength, patch.target.rows)
            weights[patch.target.parameter] = site, running
    return weights


def _stored(
    model: nn.Module,
    patch: Patch,
    known: Mapping[str, tuple[Site, StoredWeight]],
    shadows: Iterable[Shadow],
) -> tuple[Site, StoredWeight]:
    """The parameter of a patch, as wide as this patch and those before it need it."""
    name = patch.target.parameter
    if name in known:
        site, stored = known[name]
    else:
        site = find_site(model, name, shadows)
        stored = stored_weight(site.parameter, site.module)
    if not patch.widens or len(stored.shape) < 2:
        return site, stored
    rows = patch.target.rows[1] if patch.target.rows else stored.shape[0]
    wide = widened(stored, channels_of(patch.adapter, (rows, *stored.shape[1:])))
    if wide is not stored and (site.kind not in ("linear", "conv") or getattr(site.module, "groups", 1) > 1):
        raise AdapterError(
            f"it has {wide.shape[1]} input channels where the layer has {stored.shape[1]}, and only a linear "
            "layer or an ungrouped convolution can be widened; leave this file out"
        )
    return site, wide


@contextmanager
def _blamed(patch: Patch) -> Iterator[None]:
    """Errors within name the file and the layer of this patch."""
    try:
        yield
    except (AdapterError, StorageError, AttributeError) as error:
        raise PatchError(f"{patch.source}: layer {patch.target.parameter}: {error}", patch.source) from error
    except torch.cuda.OutOfMemoryError as error:
        size = adapter_bytes(patch.adapter)
        raise out_of_memory(patch.target.parameter, size, error, patch.source) from error


@contextmanager
def memory_for(name: str, size: int) -> Iterator[None]:
    """Where there is no memory for what this layer needs within, `size` bytes, the error names them."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise out_of_memory(name, size, error) from error


def out_of_memory(name: str, size: int, error: Exception, source: str | None = None) -> PatchMemoryError:
    """What is raised where a layer's patch of `size` bytes finds no memory."""
    file = "" if source is None else f"{source}: "
    return PatchMemoryError(
        f"{file}layer {name}: no memory for its {size} bytes of factors ({error}); use fewer or smaller "
        "LoRAs, a lower resolution, or close other programs that use the card",
        source,
        name,
    )


def piece_bytes(piece: Piece) -> int:
    """What a branch's factors take as the files have them, a merge or a shadow as the parameters it is."""
    if isinstance(piece, Merged):
        return sum(shadow.original.nbytes for shadow in piece.shadows)
    if isinstance(piece, Shadow):
        return piece.shadow.nbytes
    return piece.factor_bytes if isinstance(piece, WeightBranch) else 0


def make_attachments(
    model: nn.Module,
    weights: Mapping[str, tuple[Site, EffectiveWeight]],
    compute: Compute,
    dense: DensePolicy = "branch",
    step: Step = uncounted,
    card: bool = False,
) -> dict[str, tuple[Site, Piece]]:
    """One branch or merge per module, over its weight and bias, or one shadow per parameter; by name.

    step: told before each parameter; card: `policy.steps_on_a_card`.
    """
    attachments: dict[str, tuple[Site, Piece]] = {}
    alone = _Alone(model, weights, dense)
    for name, (site, effective) in weights.items():
        step()
        path = name.rpartition(".")[0]
        if site.kind == "shadow":
            try:
                with memory_for(name, effective.stored.nbytes):
                    shadow = make_shadow(site.module, site.attribute, site.parameter, effective)
            except PatchError:
                raise
            except AdapterError as error:
                raise PatchError(f"layer {name}: {error}", None, name) from error
            attachments[name] = site, shadow
        elif path not in attachments:
            with memory_for(name, factor_bytes(effective.steps)):
                branch = _make_branch(site, path, weights, compute)
            attachments[path] = site, branch
            if isinstance(branch, WeightBranch):
                here = _parts(path, weights)
                if merges(dense, site, branch, alone(site, here), card):
                    attachments[path] = site, make_merged(site.module, here, branch)
    return attachments


def merged_modules(
    model: nn.Module,
    weights: Mapping[str, tuple[Site, EffectiveWeight]],
    compute: Compute,
    dense: DensePolicy,
    card: bool = False,
) -> set[str]:
    """The modules that `make_attachments` would merge, of weights that may be sketches; card: as there.

    Not foreseen are those that turn out not to fit into their type: they run as branches instead.
    """
    merged: set[str] = set()
    alone = _Alone(model, weights, dense)
    for path in {name.rpartition(".")[0] for name in weights} if dense != "branch" else ():
        here = _parts(path, weights)
        site = here[0][0] if here else None
        if site is None or site.kind not in WEIGHT_BRANCHES:
            continue
        weight = weights[f"{path}.weight"][1] if f"{path}.weight" in weights else _unchanged(site, path)
        branch = WEIGHT_BRANCHES[site.kind](weight, None, compute)
        if isinstance(branch, WeightBranch) and merges(dense, site, branch, alone(site, here), card):
            merged.add(path)
    return merged


Parts = list[tuple[Site, EffectiveWeight]]


def _parts(path: str, weights: Mapping[str, tuple[Site, EffectiveWeight]]) -> Parts:
    """Weight and bias of a module, those that are changed."""
    return [weights[part] for part in (f"{path}.weight", f"{path}.bias") if part in weights]


class _Alone:
    """Whether a module stands at one place of the model alone, and its parameters at no other one."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, tuple[Site, EffectiveWeight]], dense: DensePolicy
    ) -> None:
        places = {(site.module, name.rpartition(".")[0]) for name, (site, _) in weights.items()}
        self._paths = Counter(module for module, _ in places)
        self._elsewhere = shared(model) if dense != "branch" else ()

    def __call__(self, site: Site, parts: Parts) -> bool:
        once = self._paths[site.module] == 1
        return once and not any(id(part.parameter) in self._elsewhere for part, _ in parts)


def _unchanged(site: Site, path: str) -> EffectiveWeight:
    """The weight of a module of which only the bias is changed."""
    try:
        return EffectiveWeight.identity(stored_weight(site.module.weight, site.module))  # type: ignore[arg-type]
    except StorageError as error:
        raise PatchError(f"layer {path}.weight: {error}", None, path) from error


def _make_branch(
    site: Site, path: str, weights: Mapping[str, tuple[Site, EffectiveWeight]], compute: Compute
) -> Branch:
    _, bias = weights.get(f"{path}.bias", (site, None))
    if site.kind == "norm":
        scale_name = f"{path}.scale" if f"{path}.scale" in weights else f"{path}.weight"
        return NormBranch(weights.get(scale_name, (site, None))[1], bias)
    _, weight = weights.get(f"{path}.weight", (site, None))
    if weight is None:
        weight = _unchanged(site, path)
    try:
        if site.kind == "conv":
            require_conv_form(site.module, weight)
        return WEIGHT_BRANCHES[site.kind](weight, bias, compute)
    except AdapterError as error:
        raise PatchError(f"layer {path}.weight: {error}", None, path) from error
