"""From a LoRA file to patches on the models that are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lib_precision_lora.adapters import Adapter, AdapterError, Target, read_adapters, to_forge_patch
from lib_precision_lora.adapters.adapter import require_finite
from lib_precision_lora.branch.sites import find_parameter, find_site
from lib_precision_lora.host.files import FileProblem
from lib_precision_lora.storage import StorageError, stored_weight

HostParser = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[dict[Any, Any], dict[str, Tensor]]]

WIDENED_BY_HOST = ("img_in.weight", "input_blocks.0.0.weight")
"""Input layers that the host widens where a file's tensor has more channels (control LoRAs)."""

TEXT_ENCODER_PREFIXES = (
    "lora_te",
    "text_encoder",
    "lora_prior_te",
    "t5xxl.",
    "clip_l.",
    "clip_g.",
    "clip_h.",
)


@dataclass(frozen=True, slots=True, eq=False)
class KeyMap:
    """One model and the names under which LoRA files know its parameters."""

    model: nn.Module
    names: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class FileMatch:
    """What one file does to the diffusion model and to the text encoders, in the host's patch format.

    unmatched: keys that belong to nothing, those of an absent text encoder left out; summary: kinds and
    ranks, for people; ranks, alphas: those that occur, alphas as the file gives them.
    """

    unet: Mapping[Any, Any]
    text_encoder: Mapping[Any, Any]
    unmatched: tuple[str, ...]
    summary: str
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()


def match_file(
    name: str,
    state_dict: Mapping[str, Tensor],
    unet: KeyMap,
    text_encoder: KeyMap | None,
    host_parser: HostParser,
) -> FileMatch:
    """The patches of a file for these models; what we do not read goes through the host's own parser.

    Raises `FileProblem` where nothing matches, and for what is damaged or has another shape.
    """
    patches: list[dict[Any, Any]] = []
    kinds: Counter[str] = Counter()
    ranks: set[int] = set()
    rest = dict(state_dict)
    absent: list[str] = []
    layout = "unknown"
    for keys in (unet, text_encoder):
        found: dict[Any, Any] = {}
        if keys is not None:
            try:
                file = read_adapters(rest, keys.names)
                for key, adapter in file.items():
                    target = Target.parse(key)
                    if check(keys.model, target, adapter):
                        found[host_key(target)] = to_forge_patch(adapter)
                        kinds[describe(adapter)] += 1
                        ranks |= {adapter.rank} - {None}  # type: ignore[arg-type]
                    else:
                        absent.append(target.parameter)
            except AdapterError as error:
                raise FileProblem(f"it cannot be applied: {error}") from error
            layout = file.layout if file.layout != "unknown" else layout
            rest = {key: rest[key] for key in file.unmatched}
        patches.append(found)
    for keys, found in zip((unet, text_encoder), patches, strict=True):
        if keys is not None and rest:
            theirs, rest = _host_patches(name, host_parser, rest, keys)
            for key, value in theirs.items():
                parameter = key if isinstance(key, str) else key[0]
                if find_parameter(keys.model, parameter) is None:
                    absent.append(parameter)
                elif key not in found:
                    found[key] = value
                    kinds[str(value[0])] += 1
    if not any(patches):
        raise FileProblem(
            f"it was made for another model: none of its {len(state_dict)} tensors ({layout} layout) "
            f"belongs to a layer of {type(getattr(unet.model, 'diffusion_model', unet.model)).__name__}"
        )
    unmatched = tuple(
        key for key in rest if text_encoder is not None or not key.startswith(TEXT_ENCODER_PREFIXES)
    )
    unmatched += tuple(f"{parameter} (no such parameter)" for parameter in absent)
    summary = ", ".join(f"{count} × {kind}" for kind, count in kinds.most_common())
    used = state_dict.keys() - rest.keys()
    return FileMatch(
        patches[0], patches[1], unmatched, summary, tuple(sorted(ranks)), read_alphas(state_dict, used)
    )


def read_alphas(state_dict: Mapping[str, Tensor], used: Iterable[str]) -> tuple[float, ...]:
    """The different alphas of these keys, smallest first."""
    alphas = (state_dict[key] for key in used if key.endswith(".alpha"))
    return tuple(sorted({float(alpha) for alpha in alphas if alpha.numel() == 1}))


def check(model: nn.Module, target: Target, adapter: Adapter) -> bool:
    """Whether the model has the parameter. Raises `AdapterError` where the adapter does not fit it.

    A misfit of an input layer that the host widens is the host's to treat.
    """
    parameter = find_parameter(model, target.parameter)
    if parameter is None:
        return False
    try:
        adapter.check(target_shape(model, target))
    except (AdapterError, StorageError) as error:
        if parameter.endswith(WIDENED_BY_HOST):
            return True
        raise AdapterError(f"layer {parameter}: {error}") from error
    return True


def target_shape(model: nn.Module, target: Target) -> tuple[int, ...]:
    """The shape of the weight that a target concerns: its rows, and all trailing dimensions.

    Raises `AdapterError` for rows that the weight does not have, `StorageError` for an unknown format.
    """
    site = find_site(model, target.parameter)
    shape = stored_weight(site.parameter, site.module).shape
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


def describe(adapter: Adapter) -> str:
    return adapter.kind if adapter.rank is None else f"{adapter.kind} rank {adapter.rank}"


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
