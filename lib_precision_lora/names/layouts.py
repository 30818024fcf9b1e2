"""Names that files give to modules, and under which names a key map may know them.

A file's name is a path inside a model behind a prefix that says which model: `transformer.`, `lora_unet_`,
`text_encoder_2.`, … The paths agree between trainers once dots are underscores; the prefixes do not. So a
name that the key map lacks is looked for under the prefixes of the others. Apart stand XLabs' attention
processors for Flux, and the norms of control LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

WRAPPER = "base_model.model."
"""Put into a module's name by PEFT's wrappers, before or after the prefix that says which model."""

_WRAPPED = re.compile(
    r"(?:^(?:module|pipe\.dit)\.|\b_orig_mod\.|\b_fsdp_wrapped_module\.|\b_checkpoint_wrapped_module\.)"
)
"""What torch's own wrappers of a module add to its name, and what DiffSynth has before it: the first two at
the beginning alone."""

HOMES = ("", "transformer.", "unet.", "diffusion_model.", "text_encoder.")
"""Put before a module's name by the pipelines that trainers save."""

_DENOISER = re.compile(
    r"(?:transformer|unet|diffusion_model|lycoris|net)\.|(?:lora_unet|lora_transformer|oft_unet|lycoris)_"
)
_FLAT_DENOISERS = ("lora_unet_", "lora_transformer_", "lycoris_")

_TEXT_ENCODERS = (
    (re.compile(r"text_encoder(?:_([23]))?\."), {None: 1, "2": 2, "3": 3}),
    (re.compile(r"lora_te([123])?_"), {None: 1, "1": 1, "2": 2, "3": 3}),
    (
        re.compile(r"(?:text_encoders\.)?(clip_l|clip_h|clip_g|t5xxl|t5)\.(?:transformer\.)?"),
        {"clip_l": 1, "clip_h": 1, "clip_g": 2, "t5xxl": 3, "t5": 3},
    ),
)
"""Prefix of a text encoder → its number as trainers count: CLIP-L 1, CLIP-G 2, T5 3."""

_T5 = re.compile(r"encoder_block_|encoder_final_layer_norm$|shared$")

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
    bare = bare_name(name)
    for home in HOMES:
        if home + bare != name:
            yield Alias(home + bare)
    number, path = text_encoder_path(bare)
    if number is None:
        for prefix in _FLAT_DENOISERS:
            yield Alias(prefix + path)
    else:
        yield Alias(f"lora_te{number}_{path}")
        if number == 1:
            yield Alias(f"lora_te_{path}")


def bare_name(name: str) -> str:
    """A name without what PEFT, torch.compile and parallel training put into it."""
    return _WRAPPED.sub("", name.replace(WRAPPER, "").removeprefix("base_model.")).removeprefix("model.")


def text_encoder_path(name: str) -> tuple[int | None, str]:
    """The number of the text encoder to which a bare name belongs (None: the diffusion model), and its path
    there with underscores.

    T5 is 3, whatever number its prefix has: it is Flux's second text encoder, SD 3's third, Chroma's only.
    """
    for prefix, numbers in _TEXT_ENCODERS:
        match = prefix.match(name)
        if match is not None:
            path = flat_path(name[match.end() :])
            return (3 if _T5.match(path) else numbers[match[1]]), path
    match = _DENOISER.match(name)
    path = flat_path(name[match.end() :] if match is not None else name)
    if path.startswith(("text_model_", "text_projection")):
        return 1, path
    return (3 if _T5.match(path) else None), path


def flat_path(path: str) -> str:
    """A module's path with underscores, attention as it is named today: processors, which early versions of
    diffusers put between, are left out, and the output projection has its number. Underscores that a
    conversion has left behind, at an end or doubled, are no part of it."""
    flat = re.sub(r"_+", "_", path.replace(".", "_")).strip("_").replace("_processor_", "_")
    flat = re.sub(r"_self_attn_to_(q|k|v|out)$", r"_self_attn_\1_proj", flat)
    return re.sub(r"_(attn\d?)_to_out$", r"_\1_to_out_0", flat)


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
