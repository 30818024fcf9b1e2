"""Names that files give to modules, and under which names a key map may know them.

A host's key map knows the names of the usual trainers. What is left are prefixes that PEFT puts before
them, XLabs' attention processors for Flux, and the norms of control LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PREFIXES = ("base_model.model.", "base_model.", "model.")
"""Put before a module's name by PEFT's wrappers."""

HOMES = ("", "transformer.", "unet.", "diffusion_model.", "text_encoder.")
"""Put before a module's name by the pipelines that trainers save."""

_XLABS = re.compile(r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)(?:_lora)?([12]?)")
_XLABS_DOUBLE = {
    ("qkv", "1"): "img_attn.qkv",
    ("qkv", "2"): "txt_attn.qkv",
    ("proj", "1"): "img_attn.proj",
    ("proj", "2"): "txt_attn.proj",
}

_CONTROL_INPUTS = ("img_in.lora_A.weight", "x_embedder.lora_A.weight")
_WHOLE_NORM = re.compile(r".*\.(query_norm\.scale|key_norm\.scale|norm_(added_)?[qk]\.weight)")


@dataclass(frozen=True, slots=True)
class Alias:
    """A name to look for. leading_rows: the adapter is for the first rows of a fused weight."""

    name: str
    leading_rows: bool = False


def aliases(name: str) -> Iterator[Alias]:
    """The names under which a key map may know a file's module, the likeliest first."""
    yield Alias(name)
    yield from _xlabs(name)
    bare = name
    for prefix in PREFIXES:
        bare = bare.removeprefix(prefix)
    for home in HOMES:
        if home + bare != name:
            yield Alias(home + bare)


def whole_norms(keys: Iterable[str]) -> frozenset[str]:
    """The keys under which a control LoRA for Flux holds norms, not as a change but as their new values.

    Beside a LoRA on the input layer, in BFL's names (`….key_norm.scale`) or those of diffusers
    (`….norm_k.weight`). Without one, such keys are those of a checkpoint.
    """
    keys = frozenset(keys)
    if not any(key.endswith(_CONTROL_INPUTS) for key in keys):
        return frozenset()
    return frozenset(key for key in keys if _WHOLE_NORM.fullmatch(key))


def _xlabs(name: str) -> Iterator[Alias]:
    """XLabs' Flux LoRAs sit at attention processors; in single blocks `linear1` starts with q, k and v."""
    match = _XLABS.fullmatch(name.removeprefix("diffusion_model."))
    if match is None:
        return
    kind, number, part, which = match.groups()
    if kind == "double" and (part, which) in _XLABS_DOUBLE:
        yield Alias(f"diffusion_model.double_blocks.{number}.{_XLABS_DOUBLE[part, which]}")
    elif kind == "single" and not which:
        end = "linear1" if part == "qkv" else "linear2"
        yield Alias(f"diffusion_model.single_blocks.{number}.{end}", leading_rows=part == "qkv")
