"""What a LoRA file will take, layer by layer, from its header: kinds, ranks, the sizes of its factors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lib_precision_lora.memory.headers import HeaderError, StoredTensor, read_header
from lib_precision_lora.memory.naming import Place, Places, text_encoder

ROLES: Mapping[str, str] = {
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight"), "up"),
    **dict.fromkeys((".lora.up.weight", "_lora.up.weight", ".up.weight"), "up"),
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight"), "down"),
    **dict.fromkeys((".lora.down.weight", "_lora.down.weight", ".down.weight"), "down"),
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_mid.weight": "mid",
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector"), "magnitude"),
    **{f".lora_magnitude_vector{ending}": "magnitude" for ending in (".weight", ".default.weight")},
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},
    ".lora_B.bias": "diff_b",
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    **{f".oft_R{ending}": "oft_R" for ending in (".weight", ".default.weight")},
    ".oft_R.scaled_oft": "scaled_oft",
    **{f".{part}": part for part in ("oft_r", "oft_s", "boft_R", "boft_s")},
    **{f".{part}.default": part for part in ("oft_r", "oft_s", "boft_R", "boft_s")},
    ".ia3_l": "ia3",
    ".ia3_l.default": "ia3",
    ".on_input": "on_input",
    ".diff": "diff",
    ".w_norm": "diff",
    ".set_weight": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    ".alpha": "alpha",
    ".q_layer.weight": "q_layer",
    ".p_layer.weight": "p_layer",
    ".lambda_layer": "lambda_layer",
    ".weight": "weight",
}
"""Endings of a LoRA file's keys → what the tensor is."""

_NAMED = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.[^.]+\.(weight|bias)$")
"""PEFT's endings with the name of the adapter in them."""

_BY_LENGTH = sorted(ROLES, key=len, reverse=True)
INPUT_LAYERS = ("img_in", "input_blocks.0.0")
"""Layers that a control LoRA may widen."""

_KINDS = (
    *(("up", "lora"), ("down", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"), ("lokr_w1_a", "lokr")),
    *(("ia3", "ia3"), ("oft_blocks", "oft"), ("oft_R", "oft"), ("oft_r", "oft"), ("boft_R", "boft")),
    *(("a1", "glora"), ("diff", "diff"), ("diff_b", "diff")),
)
"""The kind of a layer is that of the first of these that it has."""


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One adapter; factors by role; place: where it belongs in the checkpoint, where that is known."""

    name: str
    kind: str
    rank: int | None
    factors: Mapping[str, StoredTensor]
    place: Place | None

    @property
    def nbytes(self) -> int:
        """Of everything that the file has for this layer."""
        return sum(factor.nbytes for factor in self.factors.values())

    @property
    def fits_its_place(self) -> bool:
        """Whether up and down make the rows and columns of the place; True where that cannot be told, and
        where a control LoRA widens an input layer."""
        if self.place is None or "mid" in self.factors or not {"up", "down"} <= self.factors.keys():
            return True
        layer, up, down = self.place.layer, self.factors["up"], self.factors["down"]
        rows, columns = self.place.stop - self.place.start, layer.columns * math.prod(layer.kernel)
        made = math.prod(down.shape[1:])
        wider = layer.name.endswith(INPUT_LAYERS) and made > columns
        return sum(up.shape[:1]) == rows and (wider or made == columns)


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """model, text: the adapters of the diffusion model and of text encoders; unknown: keys of no known
    ending."""

    path: Path
    nbytes: int
    model: tuple[LoraLayer, ...]
    text: tuple[LoraLayer, ...]
    unknown: tuple[str, ...]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Modules of the diffusion model that belong to no layer of the checkpoint."""
        return tuple(layer.name for layer in self.model if layer.place is None)


def read_lora_header(path: Path, places: Places) -> LoraHeader:
    """The adapters of a safetensors file, matched to a checkpoint's layers by name.

    Raises `HeaderError`: not readable, a factor without sizes, or nothing in it that is known.
    """
    header = read_header(path)
    modules: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for key, tensor in header.tensors.items():
        plain = _NAMED.sub(r"\1.\2", key)
        ending = next((ending for ending in _BY_LENGTH if plain.endswith(ending)), None)
        if ending is None:
            unknown.append(key)
        else:
            modules.setdefault(plain.removesuffix(ending), {})[ROLES[ending]] = tensor
    model: list[LoraLayer] = []
    text: list[LoraLayer] = []
    for name, factors in modules.items():
        kind = _kind(factors)
        if kind is None:
            unknown.append(name)
            continue
        for factor in factors.values():
            if factor.elements == 0:
                raise HeaderError(
                    f"{path}: {factor.name} has shape {list(factor.shape)} and holds no values."
                )
        layer = LoraLayer(name, kind, _rank(kind, factors), factors, places.find(name))
        (model if text_encoder(name) is None else text).append(layer)
    if not model and not text:
        raise HeaderError(
            f"{path}: none of its {len(header.tensors)} tensors has a name of a LoRA; is it a checkpoint?"
        )
    return LoraHeader(path, header.nbytes, tuple(model), tuple(text), tuple(unknown))


def _kind(factors: Mapping[str, StoredTensor]) -> str | None:
    kind = next((kind for role, kind in _KINDS if role in factors), None)
    if "oft_blocks" in factors and kind == "oft" and len(factors["oft_blocks"].shape) == 4:
        kind = "boft"
    if kind is None or "magnitude" not in factors:
        return "ia3" if kind is None and "weight" in factors and "on_input" in factors else kind
    return "dora" if kind == "lora" else f"{kind} with dora"


def triangle_size(count: int) -> int:
    """b, where a triangle of b · (b − 1) / 2 numbers is stored; of other counts, the next smaller one's."""
    return (1 + math.isqrt(1 + 8 * count)) // 2


def _rank(kind: str, factors: Mapping[str, StoredTensor]) -> int | None:
    """Rows of the inner factor; the block of OFT; None where there is none."""
    if "oft_R" in factors:
        return triangle_size(math.prod(factors["oft_R"].shape[1:]))
    blocks = next((role for role in ("oft_blocks", "oft_r", "boft_R") if role in factors), None)
    if blocks is not None:
        return factors[blocks].shape[-1] if factors[blocks].shape else None
    if kind == "glora":
        shapes = [factors[part].shape for part in ("a1", "a2") if part in factors]
        return min((min(shape) for shape in shapes if shape), default=None)
    inner = next((role for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in factors), None)
    return None if inner is None or not factors[inner].shape else factors[inner].shape[0]
