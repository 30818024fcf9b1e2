"""What a file's header says of its training: alphas, ranks and rank-stabilized scaling, which PEFT keeps
apart from the tensors.

    scale = lora_alpha / r, or lora_alpha / √r with `use_rslora`        by layer, where a pattern names it

diffusers (0.34 and later) and SimpleTuner write PEFT's configuration as JSON under `lora_adapter_metadata`,
each of its names behind that of the component (`transformer.lora_alpha`). Others write it bare, by component,
or each name as an entry of the header.
Source: PEFT, `LoraConfig` and `get_pattern_key`; diffusers, `save_lora_weights`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lib_precision_lora.adapters.patterns import Patterns
from lib_precision_lora.names.layouts import bare_name, text_encoder_path

DIFFUSERS = "lora_adapter_metadata"
_COMPONENTS = ("transformer", "unet", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_")
_FIELDS = frozenset(
    ("lora_alpha", "alpha", "r", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "peft_type")
) | {"init_lora_weights"}
_OTHER_BASES = ("pissa", "olora", "corda", "loftq")
"""`init_lora_weights` that take their first factors out of the base: the file fits what they left of it."""

_LONGEST_JSON = 2**22


@dataclass(frozen=True, slots=True)
class Training:
    """What one layer was trained with. alpha, rank: None where the header does not say; stabilized: rsLoRA;
    dora: whether there are magnitudes, None where it does not say."""

    alpha: float | None
    rank: int | None
    stabilized: bool
    dora: bool | None

    def scale(self, rank: int) -> float | None:
        """`alpha / rank`, or `alpha / √rank`; None where the header has no alpha."""
        return None if self.alpha is None else self.alpha / (math.sqrt(rank) if self.stabilized else rank)


class Declared:
    """The training that a header declares, by layer. findings: what of it cannot be read or followed."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.findings: list[str] = []
        self._components = {
            component: _Component(fields, self.findings)
            for component, fields in _configurations(metadata, self.findings).items()
            if "lora_alpha" in fields or "r" in fields or "alpha" in fields
        }

    def of_layer(self, name: str) -> Training | None:
        """name: as the file has it; None where the header says nothing."""
        if not self._components:
            return None
        bare = bare_name(name)
        component, _, path = bare.partition(".")
        if component not in self._components:
            component, path = self._component_of(bare), _path(bare)
        found = self._components.get(component)
        return None if found is None else found.training(path, flat="." not in path)

    def _component_of(self, bare: str) -> str:
        number, _ = text_encoder_path(bare)
        wanted = ["transformer", "unet", "diffusion_model"]
        if number is not None:
            wanted = ["text_encoder"] if number == 1 else [f"text_encoder_{number}", "text_encoder_2"]
        return next((component for component in wanted if component in self._components), "")


class _Component:
    """PEFT's configuration of one component."""

    def __init__(self, fields: Mapping[str, Any], findings: list[str]) -> None:
        self._alpha = _number(fields.get("lora_alpha", fields.get("alpha")))
        self._rank = _number(fields.get("r"))
        self._alphas = Patterns("alpha_pattern", fields.get("alpha_pattern"))
        self._ranks = Patterns("rank_pattern", fields.get("rank_pattern"))
        self._stabilized = _truth(fields.get("use_rslora")) is True
        self._dora = _truth(fields.get("use_dora"))
        findings.extend(self._alphas.findings + self._ranks.findings)
        start = str(fields.get("init_lora_weights")).lower()
        if start.startswith(_OTHER_BASES):
            findings.append(
                f"the header says that the training began with {start[:20]}, which changes the base: the "
                "file fits that base alone; ask its maker for one that is converted to a plain LoRA"
            )

    def training(self, path: str, flat: bool) -> Training:
        rank = _number(self._ranks.value(path, flat, self._rank))
        return Training(
            _number(self._alphas.value(path, flat, self._alpha)),
            int(rank) if rank is not None and math.isfinite(rank) else None,
            self._stabilized,
            self._dora,
        )


def _configurations(metadata: Mapping[str, str], findings: list[str]) -> dict[str, dict[str, Any]]:
    """By component ("" for all of them): the names of PEFT's configuration that the header has."""
    found: dict[str, dict[str, Any]] = {}
    sources = sorted(metadata.items(), key=lambda entry: entry[0] != DIFFUSERS)
    for name, text in sources:
        if name in _FIELDS and name not in ("alpha", "r"):
            found.setdefault("", {}).setdefault(name, _parsed(text, text))
        elif name == DIFFUSERS or '"lora_alpha"' in text or '.lora_alpha"' in text or '"peft_type"' in text:
            parsed = _parsed(text, None)
            if not isinstance(parsed, dict):
                findings.append(
                    f"the header's {name[:60]} is no JSON that can be read: its alphas are not known"
                )
                continue
            for component, field, value in _fields(parsed):
                found.setdefault(component, {}).setdefault(field, value)
    if "lora_alpha" in found.get("", {}):  # names that only count beside PEFT's own
        for name in ("r", "alpha"):
            if name in metadata:
                found[""].setdefault(name, _parsed(metadata[name], None))
    return found


def _fields(parsed: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Component, name and value of what is known: `transformer.r`, `{"transformer": {"r": …}}`, or `r`."""
    for key, value in parsed.items():
        component, _, field = key.rpartition(".")
        if field in _FIELDS and component in ("", *_COMPONENTS):
            yield component, field, value
        elif key in _COMPONENTS and isinstance(value, dict):
            yield from ((key, field, inner) for field, inner in value.items() if field in _FIELDS)


def _path(bare: str) -> str:
    """A layer's path inside of its component."""
    component, _, path = bare.partition(".")
    if component in _COMPONENTS and path:
        return path
    return next((bare[len(prefix) :] for prefix in _FLAT if bare.startswith(prefix)), bare)


def _parsed(text: str, otherwise: Any) -> Any:
    try:
        return json.loads(text) if len(text) <= _LONGEST_JSON else otherwise
    except (ValueError, RecursionError):
        return otherwise


def _number(value: Any) -> float | None:
    """A number, also one that is written as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None
