"""What a checkpoint holds, from its header: the architecture, its components, their layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lib_precision_lora.memory.architecture import (
    Architecture,
    Flow,
    UnknownArchitectureError,
    recognize,
)
from lib_precision_lora.memory.flows import TEXT, Counts, flow_of
from lib_precision_lora.memory.headers import HeaderError, StoredTensor, read_header
from lib_precision_lora.memory.held import Storage, check_choice, held_bytes, own_storage
from lib_precision_lora.memory.packed_weights import logical_tensors
from lib_precision_lora.names.text_encoders import ADAPTER, ADAPTER_PATH, HOSTS, host_parameters
from lib_precision_lora.names.unet import unet_blocks

MODEL = "diffusion model"
MODEL_PREFIX = "model.diffusion_model."
MODEL_PREFIXES = (MODEL_PREFIX, "net.")
"""How the names of a diffusion model's parameters begin: the hosts' way, and that of Cosmos and Anima."""

COMPONENTS: Mapping[str, str] = {
    **{f"{prefix}{ADAPTER_PATH}": ADAPTER for prefix in MODEL_PREFIXES},
    **dict.fromkeys(MODEL_PREFIXES, MODEL),
    "cond_stage_model.transformer.": "CLIP-L",
    "cond_stage_model.model.": "CLIP-H",
    "conditioner.embedders.0.transformer.": "CLIP-L",
    "conditioner.embedders.0.model.": "CLIP-G",
    "conditioner.embedders.1.model.": "CLIP-G",
    "text_encoders.clip_l.transformer.": "CLIP-L",
    "text_encoders.clip_g.transformer.": "CLIP-G",
    "text_encoders.t5xxl.transformer.": "T5",
    "first_stage_model.": "VAE",
    "vae.": "VAE",
}
"""How the names of a component's parameters begin in a host's checkpoint."""

UNUSED = "other"
"""Tensors that the host does not load: averages of a training, its schedule."""

ATTRIBUTES = ("weight", "scale")
"""What a module calls its weight; norms of some models say scale."""

READ_AROUND = ("modulation", "lin", "x_pad_token", "cap_pad_token", "emb_pos")
"""Parameters that are read around the forward of their module: of Wan, Krea 2 and Z-Image."""

_EMBEDDINGS = re.compile(r"(?:.*_)?(?:embeddings?|token_embedding|position_embedding|shared|embed_tokens|"
                         r"relative_attention_bias|pos_embed|register|embed)")  # fmt: skip
"""Matrices that multiply nothing; the last word of their modules' names."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear or convolutional layer: a [rows, columns, *kernel] weight; or what else a LoRA may change.

    name: within its component, without the attribute; stored, nbytes: as in the file; multiplies: not so in
    embeddings, nor in norms, whose columns are 0.
    """

    name: str
    rows: int
    columns: int
    kernel: tuple[int, ...]
    stored: str
    nbytes: int
    flow: Flow
    attribute: str = "weight"
    multiplies: bool = True

    @property
    def parameter(self) -> str:
        return f"{self.name}.{self.attribute}" if self.name else self.attribute


@dataclass(frozen=True)
class Component:
    """One model of a checkpoint; tensors by name, without the component's prefix."""

    name: str
    layout: str
    tensors: Mapping[str, StoredTensor]
    every_layer: tuple[Layer, ...]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Those that multiply: linear and convolutional."""
        return tuple(layer for layer in self.every_layer if layer.multiplies)

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.tensors.values())

    @cached_property
    def file_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def stored(self) -> str:
        """How the host holds it when nothing else is chosen."""
        return own_storage(tuple(self.tensors.values()), self.layout)

    def held_bytes(self, storage: Storage = "as-is") -> int:
        """What it takes on the card. Raises `StorageChoiceError` where the host cannot convert it so."""
        check_choice(self.stored, storage)
        linear = {f"{layer.name}.weight" for layer in self.layers if not layer.kernel}
        return sum(
            held_bytes(tensor, name in linear, self.stored, storage) for name, tensor in self.tensors.items()
        )


@dataclass(frozen=True)
class Checkpoint:
    """components by name, in the file's order; the diffusion model is always among them."""

    path: Path
    nbytes: int
    layout: str
    architecture: Architecture
    components: Mapping[str, Component]

    @property
    def model(self) -> Component:
        return self.components[MODEL]


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a safetensors or GGUF file, from its header.

    A file of a diffusion model alone may name its parameters without a prefix. Raises `HeaderError`: not
    readable, or no diffusion model that is known.
    """
    header = read_header(path)
    parts: dict[str, dict[str, StoredTensor]] = {}
    tensors = logical_tensors(header)
    bare = not any(name.startswith(MODEL_PREFIXES) for name in tensors)
    for name, tensor in tensors.items():
        whole = MODEL_PREFIX + name if bare else name
        prefix = next((known for known in COMPONENTS if whole.startswith(known)), "")
        component = COMPONENTS.get(prefix, UNUSED)
        parts.setdefault(component, {})[whole.removeprefix(prefix)] = tensor
    model = parts.get(MODEL, {})
    try:
        architecture = recognize({name: tensor.shape for name, tensor in model.items()})
    except UnknownArchitectureError as error:
        raise HeaderError(f"{path}: {error}; is it a checkpoint of another model, or a LoRA?") from error
    components = {}
    for name, found in parts.items():
        if name == MODEL:
            layers = tuple(_model_layers(architecture, found))
        else:
            layers = tuple(_text_layers(name, found)) if name in (*HOSTS, ADAPTER) else ()
        components[name] = Component(name, header.layout, found, layers)
    return Checkpoint(path, header.nbytes, header.layout, architecture, components)


def _model_layers(architecture: Architecture, tensors: Mapping[str, StoredTensor]) -> Iterator[Layer]:
    levels = {block.name: block.level for block in unet_blocks(tensors)}
    counts = Counts.of({name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        module, _, attribute = name.rpartition(".")
        if attribute in (*ATTRIBUTES, *READ_AROUND) and tensor.shape:
            flow = flow_of(architecture.family, module, levels, counts)
            yield _layer(name, tensor, tensor.shape[0], flow)


def _text_layers(encoder: str, tensors: Mapping[str, StoredTensor]) -> Iterator[Layer]:
    """The layers of a text encoder under the host's names, whichever the file's are."""
    for name, tensor in tensors.items():
        made = host_parameters(encoder, name)
        for parameter in made:
            if parameter.rpartition(".")[2] in ATTRIBUTES and tensor.shape:
                yield _layer(parameter, tensor, tensor.shape[0] // len(made), TEXT)


def _layer(parameter: str, tensor: StoredTensor, rows: int, flow: Flow) -> Layer:
    nbytes = tensor.nbytes * rows // tensor.shape[0] if tensor.shape[0] else 0
    columns = tensor.shape[1] if len(tensor.shape) > 1 else 0
    module, _, attribute = parameter.rpartition(".")
    last = module.rpartition(".")[2]
    kernel = tensor.shape[2:]
    embeds = not kernel and _EMBEDDINGS.fullmatch(last) is not None
    multiplies = attribute == "weight" and columns > 0 and not embeds
    return Layer(module, rows, columns, kernel, tensor.stored, nbytes, flow, attribute, multiplies)
