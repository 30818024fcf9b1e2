"""Small models whose every layer trainers have a name for: parameters, shapes, and what files call them."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from tests import trainer_names, transformer_names
from tests.trainer_files import NEO_MODELS
from tests.trainer_names import Places

HIDDEN, RATIO = 8, 4
VALUES = {"Lumina 2": 4}
"""Rows of a layer's keys, where several heads of queries share one."""

CLIP = [
    f"text_model.encoder.layers.{layer}.{part}"
    for layer in range(2)
    for part in (
        *(f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")),
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm1",
        "layer_norm2",
    )
] + ["text_model.embeddings.token_embedding", "text_model.final_layer_norm", "text_projection"]
T5 = [
    f"encoder.block.{layer}.layer.{part}"
    for layer in range(2)
    for part in (
        *(f"0.SelfAttention.{letter}" for letter in "qkvo"),
        *(f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
    )
] + ["shared", "encoder.final_layer_norm"]


class Everything(Container[str]):
    """A model that has whatever parameter is asked for."""

    def __contains__(self, _: object) -> bool:
        return True


def diffusers(model: str) -> Places:
    everything: Any = Everything()
    if model in NEO_MODELS:
        return transformer_names.diffusers(model, parameters(model), HIDDEN, VALUES.get(model, HIDDEN))
    return {
        "SD 1.5": lambda: trainer_names.unet(2, everything),
        "SDXL": lambda: trainer_names.unet(2, everything),
        "Flux": lambda: trainer_names.flux(2, 2, HIDDEN, RATIO),
        "Chroma": lambda: trainer_names.chroma(2, 2, HIDDEN, RATIO, 2),
        "SD 3": lambda: trainer_names.sd3(3, HIDDEN, everything),
        "SD 3.5": lambda: trainer_names.sd3(3, HIDDEN, everything),
    }[model]()


ROOTS = {"CLIP-L": "clip_l.transformer.", "CLIP-G": "clip_g.transformer.", "T5": "t5xxl.transformer."}


def parameters(model: str) -> list[str]:
    """All that the model has, in the host's names; a CLIP-G has a CLIP-L beside it."""
    if model == "T5":
        return [f"{ROOTS[model]}{module}.weight" for module in T5]
    if model in ROOTS:
        roots = [ROOTS["CLIP-L"]] + [ROOTS["CLIP-G"]] * (model == "CLIP-G")
        return [f"{root}{module}.weight" for root in roots for module in CLIP]
    if model in NEO_MODELS:
        return list(transformer_names.parameters(model))
    return sorted({place.parameter for place in diffusers(model).values()})


def shape_in(model: str) -> Callable[[str], tuple[int, ...]]:
    """The shape of a parameter of this model."""

    def shape(parameter: str) -> tuple[int, ...]:
        if parameter.endswith("attention.qkv.weight"):
            return HIDDEN + 2 * VALUES.get(model, HIDDEN), HIDDEN
        return shape_of(parameter)

    return shape


def shape_of(parameter: str) -> tuple[int, ...]:
    if parameter.endswith("qkv.weight"):
        return 3 * HIDDEN, HIDDEN
    if parameter.endswith("linear1.weight"):
        return (3 + RATIO) * HIDDEN, HIDDEN
    return (HIDDEN,) if "norm" in parameter.rpartition(".")[0].rpartition(".")[2] else (HIDDEN, HIDDEN)


def places_of(model: str, paths: str) -> Places:
    authors = trainer_names.authors(parameters(model), ROOTS.get(model, "diffusion_model."))
    if paths == "authors":
        return authors
    if paths == "omi":
        return trainer_names.omi(authors, HIDDEN, RATIO)
    return trainer_names.fused(diffusers(model)) if paths == "fused" else diffusers(model)
