"""The endings of a LoRA file's keys: what stands before one is a module's name, the ending says which tensor.

The families (`adapters/`) and the plan (`memory/lora_header.py`) ask for a module's tensors by role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

Ending = tuple[str, str]
"""What the tensor is, and the layout that writes it so ("" where several do)."""

LORA: Mapping[str, Ending] = {
    ".lora_up.weight": ("lora_up", "kohya"),
    ".lora_down.weight": ("lora_down", "kohya"),
    ".lora_mid.weight": ("lora_mid", "kohya"),
    ".lora_B.weight": ("lora_up", "PEFT"),
    ".lora_A.weight": ("lora_down", "PEFT"),
    ".lora_B.bias": ("lora_up_bias", "PEFT"),
    ".lora_embedding_B": ("lora_embedding_up", "PEFT"),
    ".lora_embedding_A": ("lora_embedding_down", "PEFT"),
    ".lora.up.weight": ("lora_up", "diffusers"),
    ".lora.down.weight": ("lora_down", "diffusers"),
    "_lora.up.weight": ("lora_up", "diffusers attention processors"),
    "_lora.down.weight": ("lora_down", "diffusers attention processors"),
    ".lora_linear_layer.up.weight": ("lora_up", "diffusers text encoder"),
    ".lora_linear_layer.down.weight": ("lora_down", "diffusers text encoder"),
    ".up.weight": ("lora_up", "XLabs"),
    ".down.weight": ("lora_down", "XLabs"),
    ".alpha": ("alpha", ""),
}
DORA: Mapping[str, Ending] = {
    ".dora_scale": ("dora_scale", ""),
    ".magnitude": ("magnitude", "ai-toolkit"),
    ".lora_magnitude_vector": ("magnitude", "PEFT"),
    ".lora_magnitude_vector.weight": ("magnitude", "PEFT"),
}
LOHA: Mapping[str, Ending] = {
    f".hada_{part}": (f"hada_{part}", "LyCORIS") for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
}
LOKR: Mapping[str, Ending] = {
    f".lokr_{part}": (f"lokr_{part}", "LyCORIS")
    for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
}
GLORA: Mapping[str, Ending] = {
    f".{part}.weight": (part, "LyCORIS") for part in ("a1", "a2", "b1", "b2", "bm")
}
IA3: Mapping[str, Ending] = {
    ".on_input": ("on_input", "LyCORIS"),
    ".ia3_l": ("ia3_l", "PEFT"),
    ".ia3_l.default": ("ia3_l", "PEFT"),
}
OFT: Mapping[str, Ending] = {
    ".oft_blocks": ("oft_blocks", "LyCORIS"),
    ".rescale": ("rescale", "LyCORIS"),
}
PEFT_OFT: Mapping[str, Ending] = {
    ".oft_R.weight": ("oft_R", "PEFT"),
    ".oft_R.default.weight": ("oft_R", "PEFT"),
    ".oft_R.scaled_oft": ("scaled_oft", "OneTrainer"),
    ".oft_r": ("oft_r", "PEFT"),
    ".oft_r.default": ("oft_r", "PEFT"),
    ".oft_s": ("oft_s", "PEFT"),
    ".oft_s.default": ("oft_s", "PEFT"),
}
PEFT_BOFT: Mapping[str, Ending] = {
    ".boft_R": ("boft_R", "PEFT"),
    ".boft_R.default": ("boft_R", "PEFT"),
    ".boft_s": ("boft_s", "PEFT"),
    ".boft_s.default": ("boft_s", "PEFT"),
}
TLORA: Mapping[str, Ending] = {
    ".q_layer.weight": ("q_layer", "LyCORIS"),
    ".p_layer.weight": ("p_layer", "LyCORIS"),
    ".lambda_layer": ("lambda_layer", "LyCORIS"),
}
DIFF: Mapping[str, Ending] = {
    ".diff": ("diff", ""),
    ".diff_b": ("diff_b", ""),
    ".w_norm": ("diff", ""),
    ".b_norm": ("diff_b", ""),
    ".set_weight": ("set_weight", ""),
}

SPARSE_REST: Mapping[str, Ending] = {
    f".bias_{part}": (f"bias_{part}", "LyCORIS") for part in ("indices", "values", "size")
}

ENDINGS: Mapping[str, Ending] = {
    ".weight": ("weight", ""),
    **{
        ending: meaning
        for family in (
            *(LORA, DORA, LOHA, LOKR, GLORA, IA3, OFT, PEFT_OFT, PEFT_BOFT, TLORA, DIFF, SPARSE_REST),
        )
        for ending, meaning in family.items()
    },
}
"""Every ending that is known; of (IA)³, `.weight` is what LyCORIS calls its values."""

NO_FACTORS = frozenset({"alpha", "on_input", *(role for role, _ in SPARSE_REST.values())})
"""Roles that may hold no values, as far as others are concerned: their readers say how many they must have. A
sparse rest may be one of nothing."""

_NAMED = re.compile(
    r"(\.lora_(?:A|B|magnitude_vector)|\.oft_R)\.[^.]+(\.weight|\.bias)$"
    r"|(\.(?:lora_magnitude_vector|lora_embedding_[AB]|hada_[wt]\d(?:_[ab])?|lokr_[wt]\d(?:_[ab])?"
    r"|ia3_l|oft_[rs]|boft_[Rs]))\.(?!(?:weight|bias|scaled_oft)$)[^.]+()$"
)
"""PEFT's endings with the name of the adapter in them: `default`, `default_0`, or one of the user's. Modules
have `.weight` behind it, parameters nothing."""

_BY_LENGTH = sorted(ENDINGS, key=len, reverse=True)


def module_of(key: str) -> str:
    """The name of the module to which a key belongs; the key itself where its ending is not known."""
    named = _NAMED.search(key)
    suffix = named[0] if named else next((ending for ending in _BY_LENGTH if key.endswith(ending)), "")
    return key.removesuffix(suffix)


def by_module(keys: Iterable[str]) -> dict[str, list[str]]:
    """A file's keys, grouped by module; a key of unknown ending stands alone under its own name."""
    modules: dict[str, list[str]] = {}
    for key in keys:
        modules.setdefault(module_of(key), []).append(key)
    return modules


def meaning_of(module: str, key: str, whole: frozenset[str] = frozenset()) -> Ending:
    """What the tensor under a module's key is ("" where nobody knows), and the layout that writes it so.

    whole: the keys of norms that hold new values (`layouts.whole_norms`).
    """
    if key in whole:
        return "set_weight", ""
    return ENDINGS.get(_NAMED.sub(r"\1\3\2\4", key[len(module) :]), ("", ""))
