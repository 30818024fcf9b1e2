"""From a LoRA file to patches on the models that are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lib_precision_lora.adapters import (
    Adapter,
    AdapterError,
    ForgePatch,
    Target,
    channels_of,
    read_adapters,
    to_forge_patch,
)
from lib_precision_lora.adapters.adapter import require_finite
from lib_precision_lora.adapters.ia3 import IA3
from lib_precision_lora.adapters.key_map import complete_key_map
from lib_precision_lora.branch.session.sites import Site, find_parameter, find_site
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.loras.mismatch import why_nothing_matches
from lib_precision_lora.names.architectures import BUNDLED_EMBEDDING, foreign, kind_of
from lib_precision_lora.names.key_map import is_input_layer
from lib_precision_lora.names.models import model_of
from lib_precision_lora.storage import StorageError, stored_weight
from lib_precision_lora.ticks import Tick, untold

HostParser = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[dict[Any, Any], dict[str, Tensor]]]

ENCODER_NUMBERS = {"clip_l": 1, "clip_h": 1, "clip_g": 2, "t5xxl": 3}
"""The host's names of text encoders → their numbers in files."""


PutAside = Callable[[nn.Module, str], Tensor | None]
"""As `Host.put_aside`: a patch of another extension may have made what is present wider."""


def nothing_aside(model: nn.Module, name: str) -> Tensor | None:
    """Of a model into which nothing was merged."""
    return None


@dataclass(frozen=True, slots=True, eq=False)
class KeyMap:
    """One model and the names under which LoRA files know its parameters.

    architecture: which model it is, where that is known; aside: what the host has put aside of it.
    """

    model: nn.Module
    names: Mapping[str, Any]
    architecture: str | None = None
    aside: PutAside = nothing_aside


def key_map_of(model: nn.Module, names: Mapping[str, Any], aside: PutAside = nothing_aside) -> KeyMap:
    """The host's names of a model, completed with those that it lacks; aside: as of `KeyMap`."""

    def shape_of(parameter: str) -> tuple[int, ...]:
        return target_shape(model, Target(parameter), aside)

    parameters = [name for name, _ in model.named_parameters()]
    return KeyMap(model, complete_key_map(names, parameters, shape_of), model_of(parameters), aside)


@dataclass(frozen=True, slots=True, eq=False)
class FileMatch:
    """What one file does to the diffusion model and to the text encoders, in the host's patch format.

    unmatched: keys that belong to nothing; without_encoder: keys of text encoders that the checkpoint lacks;
    bundled textual inversions, which are the host's, are in neither. summary: kinds and ranks, for people;
    ranks, alphas: those that occur, alphas as the file or its header gives them; findings: as of
    `AdapterFile`, what people should know of a file that is applied.
    """

    unet: Mapping[Any, Any]
    text_encoder: Mapping[Any, Any]
    unmatched: tuple[str, ...]
    without_encoder: tuple[str, ...]
    summary: str
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    findings: tuple[str, ...] = ()


def match_file(
    name: str,
    state_dict: Mapping[str, Tensor],
    unet: KeyMap,
    text_encoder: KeyMap | None,
    host_parser: HostParser,
    tick: Tick = untold,
    metadata: Mapping[str, str] | None = None,
) -> FileMatch:
    """The patches of a file for these models; what we do not read goes through the host's own parser.

    tick: told before each layer, whose every number is looked at; metadata: as in `read_adapters`.
    Raises `FileProblem` where nothing matches, where what does not match is made for another architecture,
    and for what is damaged or has another shape.
    """
    patches: list[dict[Any, Any]] = []
    kinds: Counter[str] = Counter()
    ranks: set[int] = set()
    rest = dict(state_dict)
    header: Mapping[str, str] = getattr(state_dict, "metadata", {}) if metadata is None else metadata
    absent: list[str] = []
    findings: dict[str, None] = {}
    alphas: set[float] = set()
    misfit = ""
    layout = "unknown"
    for keys in (unet, text_encoder):
        found: dict[Any, Any] = {}
        if keys is not None:
            try:
                file = read_adapters(rest, keys.names, tick, header)
            except AdapterError as error:
                raise FileProblem(f"it cannot be applied: {error}") from error
            for key, adapter in file.items():
                target = Target.parse(key)
                try:
                    patch = patch_of(keys, target, adapter)
                except AdapterError as error:
                    misfit = misfit or str(error)
                    continue
                if patch is not None:
                    found[host_key(target)] = patch
                    kinds[describe(patch)] += 1
                    ranks |= {adapter.rank} - {None}  # type: ignore[arg-type]
                elif not (isinstance(adapter, IA3) and target.parameter.endswith(".bias")):
                    absent.append(target.parameter)  # (IA)³ has no key for the bias that it may scale
            layout = file.layout if file.layout != "unknown" else layout
            parts = frozenset(file.parts)
            findings |= dict.fromkeys(file.findings)
            alphas |= set(file.alphas.values())
            rest = {key: rest[key] for key in file.unmatched if key not in parts}
        patches.append(found)
    for keys, found in zip((unet, text_encoder), patches, strict=True):
        if keys is not None and rest:
            before = rest
            theirs, rest = _host_patches(name, host_parser, rest, keys)
            alphas |= read_alphas(before, before.keys() - rest.keys())
            for key, value in theirs.items():
                parameter = key if isinstance(key, str) else key[0]
                if find_parameter(keys.model, parameter) is None:
                    absent.append(parameter)
                elif key not in found:
                    found[key] = value
                    kinds[str(value[0])] += 1
                else:
                    findings[f"layer {parameter} stands in the file a second time, which is not used"] = None
    rest = {key: value for key, value in rest.items() if not key.startswith(BUNDLED_EMBEDDING)}
    present = encoders_of(text_encoder)
    without_encoder = tuple(key for key in rest if (kind_of(key).text_encoder or 0) not in (0, *present))
    unmatched = tuple(key for key in rest if key not in without_encoder)
    require_one_model(unet.architecture, unmatched, len(state_dict), in_part=bool(patches[0]) and not misfit)
    if misfit:
        raise FileProblem(f"it cannot be applied: {misfit}")
    if not any(patches):
        names = [keys.names for keys in (unet, text_encoder) if keys is not None]
        loaded = type(getattr(unet.model, "diffusion_model", unet.model)).__name__
        raise FileProblem(why_nothing_matches(state_dict.keys(), names, layout, loaded, unet.architecture))
    unmatched += tuple(f"{parameter} (no such parameter)" for parameter in absent)
    summary = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    return FileMatch(
        patches[0],
        patches[1],
        unmatched,
        without_encoder,
        summary,
        tuple(sorted(ranks)),
        tuple(sorted(alphas)),
        tuple(findings),
    )


def read_alphas(state_dict: Mapping[str, Tensor], used: Iterable[str]) -> set[float]:
    """The different alphas of these keys."""
    alphas = (state_dict[key] for key in used if key.endswith(".alpha"))
    return {float(alpha) for alpha in alphas if alpha.numel() == 1 and not alpha.is_complex()}


def encoders_of(text_encoder: KeyMap | None) -> frozenset[int]:
    """The numbers of the text encoders that there are. A CLIP-G alone is called the first one too, and what
    the host calls otherwise may be any of them."""
    if text_encoder is None:
        return frozenset()
    roots = {Target.parse(value).parameter.partition(".")[0] for value in text_encoder.names.values()}
    if not roots <= ENCODER_NUMBERS.keys():
        return frozenset(ENCODER_NUMBERS.values())
    numbers = frozenset(ENCODER_NUMBERS[root] for root in roots)
    return numbers if numbers != {2} else numbers | {1}


def require_one_model(model: str | None, unmatched: tuple[str, ...], tensors: int, in_part: bool) -> None:
    """Raise `FileProblem` for a file that speaks of another architecture than the one that is loaded.

    unmatched: its keys that belong to no layer, of so many tensors; in_part: the others fit.
    """
    strange, other = foreign(unmatched, model)
    if not strange:
        return
    share = f"{len(strange)} of its {tensors} tensors are of {other}"
    if in_part:
        raise FileProblem(
            f"it mixes architectures: {share} (the first is {strange[0]}), others fit the {model} that is "
            "loaded; use a file that was made for one model"
        )
    raise FileProblem(f"it was made for another model: {share}, and the model that is loaded is {model}")


def patch_of(keys: KeyMap, target: Target, adapter: Adapter) -> ForgePatch | None:
    """The adapter as a patch of this map's model, None where the model has no such parameter.

    Raises `AdapterError` where the adapter does not fit it.
    """
    parameter = find_parameter(keys.model, target.parameter)
    if parameter is None:
        return None
    try:
        shape = target_shape(keys.model, target, keys.aside)
        widens = is_input_layer(parameter) and channels_of(adapter, shape) != shape[1]
        if not widens:
            adapter.check(shape)
    except (AdapterError, StorageError) as error:
        raise AdapterError(f"layer {parameter}: {error}") from error
    return to_forge_patch(adapter, widens)


def target_shape(model: nn.Module, target: Target, aside: PutAside) -> tuple[int, ...]:
    """The shape of the weight that a target concerns: its rows, and all trailing dimensions.

    Raises `AdapterError` for rows that the weight does not have, `StorageError` for an unknown format.
    """
    site = find_site(model, target.parameter)
    return shape_of_rows(shape_at(model, site, target.parameter, aside), target)


def shape_at(model: nn.Module, site: Site, name: str, aside: PutAside) -> tuple[int, ...]:
    """The shape of the checkpoint's weight at a site, of a parameter of this name. Raises `StorageError`."""
    own = aside(model, name)
    return stored_weight(site.parameter if own is None else own, site.module).shape


def shape_of_rows(shape: tuple[int, ...], target: Target) -> tuple[int, ...]:
    """That of the target's rows of a weight of this shape. Raises `AdapterError` where it lacks them."""
    if target.rows is None:
        return shape
    start, length = target.rows
    if start + length > shape[0]:
        raise AdapterError(f"rows {start} to {start + length} of a weight that has {shape[0]}")
    return (length, *shape[1:])


def host_key(target: Target) -> Any:
    """The key under which the host's `add_patches` takes a patch of this target."""
    offset = None if target.rows is None else (0, *target.rows)
    if target.row_function is not None:
        return target.parameter, offset, target.row_function
    return target.parameter if offset is None else (target.parameter, offset)


def describe(patch: ForgePatch) -> str:
    adapter = patch.adapter
    kind = adapter.kind if adapter.rank is None else f"{adapter.kind} rank {adapter.rank}"
    return f"{kind} (other input channels)" if patch.widens else kind


def _host_patches(
    name: str, host_parser: HostParser, rest: Mapping[str, Tensor], keys: KeyMap
) -> tuple[dict[Any, Any], dict[str, Tensor]]:
    try:
        patches, unmatched = host_parser(dict(rest), keys.names)
        for key in rest.keys() - unmatched.keys():
            require_finite(name, **{key: rest[key].float()})
        return patches, unmatched
    except AdapterError as error:
        raise FileProblem(f"it cannot be applied: {error}") from error
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise FileProblem(f"it cannot be applied: the WebUI's own reader fails on it ({error!r})") from error
