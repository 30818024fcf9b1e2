"""What a LoRA file will take, layer by layer, from its header: kinds, ranks, the sizes of its factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lib_precision_lora.memory.headers import HeaderError, StoredTensor, read_header
from lib_precision_lora.memory.naming import Place, Places, of_text_encoder
from lib_precision_lora.names.endings import NO_FACTORS, by_module, meaning_of
from lib_precision_lora.names.key_map import is_input_layer
from lib_precision_lora.names.layouts import whole_norms

MAGNITUDES = frozenset({"dora_scale", "magnitude"})
"""The roles of a DoRA's magnitude."""

_KINDS = (
    *(("lora_up", "lora"), ("lora_down", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr")),
    *(("lokr_w1_a", "lokr"), ("ia3_l", "ia3"), ("oft_blocks", "oft"), ("oft_R", "oft"), ("oft_r", "oft")),
    *(("boft_R", "boft"), ("a1", "glora"), ("diff", "diff"), ("set_weight", "diff"), ("diff_b", "diff")),
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
        factors = self.factors
        if self.place is None or "lora_mid" in factors or not {"lora_up", "lora_down"} <= factors.keys():
            return True
        layer, up, down = self.place.layer, factors["lora_up"], factors["lora_down"]
        rows, columns = self.place.stop - self.place.start, layer.columns * math.prod(layer.kernel)
        made = math.prod(down.shape[1:])
        wider = is_input_layer(layer.name) and made > columns
        return sum(up.shape[:1]) == rows and (wider or made == columns)


@dataclass(frozen=True, slots=True)
class LoraHeader:
    """model, text: the adapters of the diffusion model and of text encoders; unknown: keys of no known
    ending, and those of a layer that the file names a second time."""

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
    whole = whole_norms(header.tensors)
    model: list[LoraLayer] = []
    text: list[LoraLayer] = []
    unknown: list[str] = []
    taken: set[tuple[Place, str]] = set()
    for name, keys in by_module(header.tensors).items():
        factors: dict[str, StoredTensor] = {}
        for key in keys:
            role, _ = meaning_of(name, key, whole)
            if role:
                factors[role] = header.tensors[key]
            else:
                unknown.append(key)
        kind = _kind(factors)
        if kind is None:
            unknown.extend(factor.name for factor in factors.values())
            continue
        for role, factor in factors.items():
            if factor.elements == 0 and role not in NO_FACTORS:
                raise HeaderError(
                    f"{path}: {factor.name} has shape {list(factor.shape)} and holds no values."
                )
        layer = LoraLayer(name, kind, _rank(kind, factors), factors, places.find(name))
        if layer.place is not None:
            own = {(layer.place, part) for part in _parts(factors)}
            if taken & own:
                unknown.extend(keys)
                continue
            taken |= own
        (text if of_text_encoder(name, layer.place) else model).append(layer)
    if not model and not text:
        raise HeaderError(
            f"{path}: none of its {len(header.tensors)} tensors has a name of a LoRA; is it a checkpoint?"
        )
    return LoraHeader(path, header.nbytes, tuple(model), tuple(text), tuple(unknown))


def _parts(factors: Iterable[str]) -> Iterator[str]:
    """Which parameters of a layer a file changes; factors: their roles."""
    biases = {"diff_b", "lora_up_bias"}
    if not biases.issuperset(factors):
        yield "weight"
    if not biases.isdisjoint(factors):
        yield "bias"


def _kind(factors: Mapping[str, StoredTensor]) -> str | None:
    kind = next((kind for role, kind in _KINDS if role in factors), None)
    if "oft_blocks" in factors and kind == "oft" and len(factors["oft_blocks"].shape) == 4:
        kind = "boft"
    if kind is None or not MAGNITUDES & factors.keys():
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
    inner = next(
        (role for role in ("lora_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in factors), None
    )
    return None if inner is None or not factors[inner].shape else factors[inner].shape[0]
