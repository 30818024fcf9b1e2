"""Files in every layout of today's trainers, on Neo's models: each key meets its layer.

As `tests/forge/test_layouts.py`: what a file adds is read off the effective weights that our branches run,
and compared with float64 sums of the file's own tensors, put where the trainer meant them. Neo's own reader
is asked beside it: where it knows a key, ours is for the same rows of the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import Target
from lib_precision_lora.branch.session.compose import effective_weights
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.branch.session.patch import Patch
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.loras.matching import FileMatch, key_map_of, match_file
from lib_precision_lora.names import models
from lib_precision_lora.names.architectures import foreign
from tests import trainer_names, transformer_names
from tests.neo.real_neo import Neo
from tests.neo.tiny_models import TINY_MODELS, Tiny
from tests.trainer_files import ALL_LAYOUTS, NEO_LAYOUTS, NEO_MODELS, make_file
from tests.trainer_names import Places

LARGEST_ERROR = 1e-6
LIKE_FORGES = ("SD 1.5", "SDXL", "Flux", "Chroma")
LAYOUTS = {name: ALL_LAYOUTS[name] for name in (*LIKE_FORGES, *NEO_MODELS)}
EVERY = [(model, layout) for model, layouts in LAYOUTS.items() for layout in layouts]
TINY_NAMES = {"Wan": "Wan with CLIP"}
"""The variant that has the most layers."""

READ_OF_EVERY_MODEL = {"kohya", "OneTrainer for ComfyUI"}
_DOTTED = {"diffusers, SimpleTuner, ai-toolkit", "OneTrainer, full names"}
_OF_TRANSFORMERS = {"authors' names, ai-toolkit", "LyCORIS by kohya"}
_BARE = {"diffusers, bare", "ai-toolkit, for ComfyUI", "DiffSynth, diffusers' names"}
_LYCORIS = {"LyCORIS alone, SimpleTuner", "ai-toolkit, LoKr"}
_UNET = {"kohya, SDXL", "LyCORIS by kohya", "LyCORIS alone, SimpleTuner", "diffusers, attention processors"}
_UNET |= {"diffusers, bare attention processors"}
READ_BY_NEO: Mapping[str, set[str]] = {
    "SD 1.5": _UNET,
    "SDXL": _UNET,
    "Flux": {*_OF_TRANSFORMERS, *_DOTTED, *_LYCORIS, "diffusers, bare", "OneTrainer"},
    "Chroma": _OF_TRANSFORMERS,
    "Flux 2": _OF_TRANSFORMERS,
    "Wan": _OF_TRANSFORMERS,
    "Anima": _OF_TRANSFORMERS,
    "Lumina 2": _OF_TRANSFORMERS,
    "Z-Image": {*_OF_TRANSFORMERS, *_DOTTED, *_LYCORIS, *_BARE},
    "Krea 2": {"authors' names, ai-toolkit", *_DOTTED, *_BARE},
    "Ernie-Image": {
        *(*_OF_TRANSFORMERS, *_DOTTED),
        *("ai-toolkit, LoKr", "ai-toolkit, for ComfyUI", "musubi-tuner, Z-Image"),
    },
    "Qwen-Image": {
        *(*_OF_TRANSFORMERS, *_DOTTED, *_LYCORIS, *_BARE),
        *("authors' names", "DiffSynth", "musubi-tuner, Z-Image"),
    },
}
"""The layouts of which Neo's own reader leaves no key over; of others it leaves some or all."""

HIDDEN = {"Z-Image": 256}
VALUES = {"Lumina 2": 32}


class Subject:
    """One of Neo's models with its key map, ours and stock, and the names that trainers have for it."""

    def __init__(self, neo: Neo, name: str) -> None:
        self.name = name
        self.tiny: Tiny = TINY_MODELS[TINY_NAMES.get(name, name)](neo)
        self.stock = self.tiny.key_map
        self.keys = key_map_of(self.tiny.model, self.stock)
        self.shapes = {key: tuple(value.shape) for key, value in self.tiny.model.named_parameters()}
        hidden = HIDDEN.get(name, 64)
        authors = trainer_names.authors(self.shapes)
        theirs = diffusers(name, self.shapes, hidden)
        self.places: Mapping[str, Places] = {
            "authors": authors,
            "diffusers": theirs,
            "fused": trainer_names.fused(theirs),
            "omi": trainer_names.omi(authors, hidden, 4),
        }

    def match(self, state: Mapping[str, Tensor]) -> FileMatch:
        return match_file("test", state, self.keys, None, nothing)

    def file(self, layout: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        form = LAYOUTS[self.name][layout]
        return make_file(form, self.places[form.paths], self.shapes)

    def deltas(self, match: FileMatch) -> dict[str, Tensor]:
        """What our branches of these patches add, in float64, by parameter."""
        ours = [Patch("test", Target.parse(key), value.adapter, 1.0) for key, value in match.unet.items()]
        weights = effective_weights(self.tiny.model, ours, FittedAdapters())
        return {name: effective.delta(torch.float64) for name, (_, effective) in weights.items()}


def nothing(state: Mapping[str, Tensor], names: Mapping[str, Any]) -> Any:
    """As `NeoHost.parse`."""
    return {}, dict(state)


def diffusers(name: str, shapes: Mapping[str, Any], hidden: int) -> Places:
    if name in NEO_MODELS:
        return transformer_names.diffusers(name, shapes, hidden, VALUES.get(name, hidden))
    places = {
        "SD 1.5": lambda: trainer_names.unet(2, shapes),
        "SDXL": lambda: trainer_names.unet(2, shapes),
        "Flux": lambda: trainer_names.flux(1, 1, hidden, 4),
        "Chroma": lambda: trainer_names.chroma(1, 1, hidden, 4, 2),
    }[name]()
    return {  # Neo's norms of Flux have a weight, as all others
        path: place if place.parameter in shapes else replace(place, attribute="weight")
        for path, place in places.items()
    }


@pytest.fixture(scope="module")
def subjects(neo: Neo) -> Mapping[str, Subject]:
    return {name: Subject(neo, name) for name in LAYOUTS}


@pytest.mark.parametrize(("model", "layout"), EVERY)
def test_every_key_of_every_layout_meets_its_layer(
    subjects: Mapping[str, Subject], model: str, layout: str
) -> None:
    subject = subjects[model]
    state, expected = subject.file(layout)
    assert len(expected) > 3
    match = subject.match(state)
    assert match.unmatched == match.without_encoder == ()
    actual = subject.deltas(match)
    assert set(actual) == set(expected)
    errors = {name: float((actual[name] - delta).norm() / delta.norm()) for name, delta in expected.items()}
    assert max(errors.values()) <= LARGEST_ERROR, errors
    assert foreign(state, subject.keys.architecture) == ((), "")


@pytest.mark.parametrize(("model", "layout"), EVERY)
def test_what_neo_reads_is_for_the_same_weight(
    neo: Neo, subjects: Mapping[str, Subject], model: str, layout: str
) -> None:
    subject = subjects[model]
    state, _ = subject.file(layout)
    patches, left = neo.lora.load_lora(dict(state), dict(subject.stock))
    assert (not left) == (layout in READ_OF_EVERY_MODEL | READ_BY_NEO[model]), f"{len(left)} left over"
    theirs = {Target.parse(key) for key in patches}
    ours = {Target.parse(key) for key in subject.match(state).unet}
    assert {(target.parameter, target.rows) for target in theirs if fits(subject, target)} <= {
        (target.parameter, target.rows) for target in ours
    }


def fits(subject: Subject, target: Target) -> bool:
    """Whether the model has these rows: Neo's names of Lumina 2's keys and values, and of Flux's norms, lead
    nowhere."""
    shape = subject.shapes.get(target.parameter)
    return shape is not None and (target.rows is None or sum(target.rows) <= shape[0])


@pytest.mark.parametrize("model", NEO_MODELS)
def test_the_layers_that_files_may_concern_are_those_that_the_host_has(
    subjects: Mapping[str, Subject], model: str
) -> None:
    """So that the tests that have no host speak of these models."""
    weights = {name for name in subjects[model].shapes if name.endswith((".weight", ".scale"))}
    assert set(transformer_names.parameters(model)) == weights


@pytest.mark.parametrize("model", LAYOUTS)
def test_each_model_is_known_by_its_parameters(subjects: Mapping[str, Subject], model: str) -> None:
    names = {"SD 1.5": models.UNET, "SDXL": models.UNET, "Flux": models.FLUX, "Chroma": models.FLUX}
    assert subjects[model].keys.architecture == names.get(model, model)


def test_a_control_loras_norms_are_those_that_neo_calls_otherwise(subjects: Mapping[str, Subject]) -> None:
    """BFL's files give the scales of norms as new values, beside a LoRA on the input layer."""
    subject = subjects["Flux"]
    state = {"img_in.lora_A.weight": torch.ones(2, 32), "img_in.lora_B.weight": torch.ones(64, 2)}
    norms = [name for name in subject.shapes if name.endswith(("query_norm.weight", "key_norm.weight"))]
    for norm in norms:
        path = norm.removeprefix("diffusion_model.").removesuffix("weight")
        state[f"{path}scale"] = torch.ones(subject.shapes[norm])
    match = subject.match(state)
    assert len(norms) == 6
    assert match.unmatched == ()
    assert {Target.parse(key).parameter for key in match.unet} == {*norms, "diffusion_model.img_in.weight"}


ADAPTER = {
    "sd-scripts": lambda path: f"lora_unet_llm_adapter_{path.replace('.', '_')}",
    "as Neo renames it": lambda path: f"lora_te_llm_adapter_{path.replace('.', '_')}",
    "ComfyUI": lambda path: f"diffusion_model.llm_adapter.{path}",
    "Cosmos": lambda path: f"net.llm_adapter.{path}",
    "diffusers": lambda path: f"text_conditioner.{path}",
}
"""What files call the layers of Anima's adapter, which Neo keeps in the text encoder."""

LANGUAGE_MODEL = {
    "sd-scripts": lambda path: f"lora_te_{path.removeprefix('model.').replace('.', '_')}",
    "sd-scripts, for ComfyUI": lambda path: f"text_encoders.qwen3_06b.transformer.{path}",
    "Neo": lambda path: f"text_encoders.qwen3_06b.{path}",
}
"""What files call the layers of Anima's text encoder itself."""


@pytest.mark.parametrize(
    ("root", "name"),
    [("qwen3_06b.llm_adapter.", name) for name in ADAPTER.values()]
    + [("qwen3_06b.", name) for name in LANGUAGE_MODEL.values()],
    ids=[*(f"adapter, {writer}" for writer in ADAPTER), *LANGUAGE_MODEL],
)
def test_every_layer_of_animas_text_encoder_is_met(
    neo: Neo, subjects: Mapping[str, Subject], root: str, name: Callable[[str], str]
) -> None:
    """Beside a diffusion model that has none of them."""
    tiny = TINY_MODELS["Anima's text encoder"](neo)
    state, expected = {}, set()
    for parameter, weight in tiny.model.named_parameters():
        path = parameter.removeprefix(root).removesuffix(".weight")
        mine = parameter.startswith(root) and parameter.endswith(".weight") and weight.ndim > 1
        if not mine or (root == "qwen3_06b." and path.startswith("llm_adapter.")):
            continue
        state[f"{name(path)}.lora_A.weight"] = torch.ones(2, weight.shape[1])
        state[f"{name(path)}.lora_B.weight"] = torch.ones(weight.shape[0], 2)
        expected.add(parameter)
    assert len(expected) > 8
    match = match_file("test", state, subjects["Anima"].keys, key_map_of(tiny.model, tiny.key_map), nothing)
    assert (match.unmatched, match.without_encoder, dict(match.unet)) == ((), (), {})
    assert set(match.text_encoder) == expected


STRANGERS = [(model, other) for model in LAYOUTS for other in NEO_LAYOUTS if model != other]


@pytest.mark.parametrize(("model", "other"), STRANGERS)
def test_a_file_for_another_model_is_refused(subjects: Mapping[str, Subject], model: str, other: str) -> None:
    """By its names where they tell; Flux and Flux 2, or Lumina 2 and Z-Image, share some, of other shapes."""
    for layout in ("kohya", "diffusers, SimpleTuner, ai-toolkit"):
        state, _ = subjects[other].file(layout)
        with pytest.raises(FileProblem) as refused:
            subjects[model].match(state)
        assert "\n" not in str(refused.value)
        if model != "Chroma":
            assert str(subjects[model].keys.architecture) in str(refused.value)
