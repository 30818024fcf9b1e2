"""Files in every layout of today's trainers, on the real host's models: each key meets its layer.

What a file adds is read off the effective weights that our branches run, and compared with float64 sums of
the file's own tensors, put where the trainer meant them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.adapters import Target
from lib_precision_lora.branch.session.compose import effective_weights
from lib_precision_lora.branch.session.fitted import FittedAdapters
from lib_precision_lora.branch.session.patch import Patch
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.loras.matching import FileMatch, KeyMap, key_map_of, match_file
from lib_precision_lora.names.models import FLUX, SD3, UNET, model_of
from tests import trainer_names
from tests.forge import small_flux
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import TINY_MODELS
from tests.tiny import Tiny
from tests.trainer_files import EVERY, LAYOUTS, make_file
from tests.trainer_names import Places

LARGEST_ERROR = 1e-6
ENCODERS = {"CLIP-L": ("CLIP", "clip_l.transformer."), "CLIP-G": ("CLIP", "clip_g.transformer.")}
ENCODERS |= {"T5": ("T5", "t5xxl.transformer.")}


class Subject:
    """One of the host's models with its key map, ours and stock, and the names that trainers have for it."""

    def __init__(self, forge: Forge, name: str) -> None:
        tiny_name, root = ENCODERS.get(name, (name, "diffusion_model."))
        self.tiny: Tiny = TINY_MODELS[tiny_name](forge)
        self.stock = self.tiny.key_map
        self.keys = key_map_of(self.tiny.model, self.stock)
        self.shapes = {key: tuple(value.shape) for key, value in self.tiny.model.named_parameters()}
        self.is_encoder = name in ENCODERS
        self.places: Mapping[str, Places] = {"authors": trainer_names.authors(self.shapes, root)}
        if not self.is_encoder:
            theirs = diffusers(name, self.shapes)
            hidden = 128 if name.startswith("SD 3") else 64
            self.places = {
                **self.places,
                "diffusers": theirs,
                "fused": trainer_names.fused(theirs),
                "omi": trainer_names.omi(self.places["authors"], hidden, 4),
            }

    def match(self, forge: Forge, state: Mapping[str, Tensor]) -> FileMatch:
        other = KeyMap(self.tiny.model, {})
        unet, encoder = (other, self.keys) if self.is_encoder else (self.keys, None)
        return match_file("test", state, unet, encoder, forge.lora.load_lora)

    def deltas(self, match: FileMatch) -> dict[str, Tensor]:
        """What our branches of these patches add, in float64, by parameter."""
        patches = match.text_encoder if self.is_encoder else match.unet
        ours = [Patch("test", Target.parse(key), value.adapter, 1.0) for key, value in patches.items()]
        weights = effective_weights(self.tiny.model, ours, FittedAdapters())
        return {name: effective.delta(torch.float64) for name, (_, effective) in weights.items()}


def diffusers(name: str, shapes: Mapping[str, Any]) -> Places:
    sizes = {
        "SD 1.5": lambda: trainer_names.unet(2, shapes),
        "SDXL": lambda: trainer_names.unet(2, shapes),
        "Flux": lambda: trainer_names.flux(1, 1, 64, 4),
        "Chroma": lambda: trainer_names.chroma(1, 1, 64, 4, 2),
        "SD 3": lambda: trainer_names.sd3(2, 128, shapes),
        "SD 3.5": lambda: trainer_names.sd3(2, 128, shapes),
    }
    return sizes[name]()


@pytest.fixture(scope="module")
def subjects(forge: Forge) -> Mapping[str, Subject]:
    return {name: Subject(forge, name) for name in LAYOUTS}


@pytest.mark.parametrize(("model", "layout"), EVERY)
def test_every_key_of_every_layout_meets_its_layer(
    forge: Forge, subjects: Mapping[str, Subject], model: str, layout: str
) -> None:
    subject = subjects[model]
    form = LAYOUTS[model][layout]
    state, expected = make_file(form, subject.places[form.paths], subject.shapes)
    assert len(expected) > 3
    match = subject.match(forge, state)
    assert match.unmatched == match.without_encoder == ()
    assert not (match.unet if subject.is_encoder else match.text_encoder)
    actual = subject.deltas(match)
    assert set(actual) == set(expected)
    errors = {name: float((actual[name] - delta).norm() / delta.norm()) for name, delta in expected.items()}
    assert max(errors.values()) <= LARGEST_ERROR, errors


@pytest.mark.parametrize("model", [model for model in LAYOUTS if model not in ENCODERS])
def test_diffusers_names_leave_out_no_layer(subjects: Mapping[str, Subject], model: str) -> None:
    """So that the files of the other test cover the model: what its authors name, diffusers names too."""
    subject = subjects[model]
    named = {place.parameter for place in subject.places["diffusers"].values()}
    assert named == {place.parameter for place in subject.places["authors"].values()}


def file_for(subjects: Mapping[str, Subject], model: str, layout: str) -> dict[str, Tensor]:
    form, subject = LAYOUTS[model][layout], subjects[model]
    return make_file(form, subject.places[form.paths], subject.shapes)[0]


@pytest.mark.parametrize("kind", ["NF4", "Q4_K", "FP8"])
def test_names_of_fused_parts_mean_the_same_rows_in_every_stored_format(forge: Forge, kind: str) -> None:
    """A packed weight's own shape is that of its bytes."""
    stored = small_flux.stored(forge, kind)
    exact = small_flux.load(forge, small_flux.random_state(small_flux.flux_of(small_flux.SIZES)), stored.run)
    ours = {
        name: target
        for name, target in key_map_of(stored.model, stored.key_map).names.items()
        if name not in stored.key_map
    }
    assert ours == {name: key_map_of(exact.model, exact.key_map).names[name] for name in ours}
    assert ours["lora_unet_single_blocks_0_linear1_3"] == Target(
        "diffusion_model.single_blocks.0.linear1.weight", (768, 1024)
    )


STRANGERS = [
    ("SD 1.5", "Flux", "kohya", FLUX),
    ("SD 1.5", "Flux", "diffusers, SimpleTuner, ai-toolkit", FLUX),
    ("SD 1.5", "SD 3", "kohya", SD3),
    ("SDXL", "Chroma", "OneTrainer", FLUX),
    ("Flux", "SD 1.5", "kohya", UNET),
    ("Flux", "SD 3", "kohya", SD3),
    ("SD 3", "Flux", "kohya", FLUX),
    ("SD 3", "SDXL", "kohya, SDXL", UNET),
    ("Chroma", "SD 1.5", "diffusers with PEFT", UNET),
]


@pytest.mark.parametrize(("model", "other", "layout", "name"), STRANGERS)
def test_a_file_for_another_architecture_is_refused_by_its_name(
    forge: Forge, subjects: Mapping[str, Subject], model: str, other: str, layout: str, name: str
) -> None:
    """Also one whose text encoder keys would fit, as CLIP-L is the same in most models, or a few names that
    all transformers share, as `final_layer.linear`, whose widths differ."""
    subject, encoder = subjects[model], subjects["CLIP-L"]
    state = file_for(subjects, other, layout) | file_for(subjects, "CLIP-L", "kohya")
    with pytest.raises(FileProblem, match=r"^it (was made for another model|mixes architectures)") as refused:
        match_file("test", state, subject.keys, encoder.keys, forge.lora.load_lora)
    assert name in str(refused.value)
    assert str(model_of(subject.shapes)) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("model", "other", "layout", "name"), STRANGERS)
def test_a_file_that_mixes_architectures_is_refused_and_both_are_named(
    forge: Forge, subjects: Mapping[str, Subject], model: str, other: str, layout: str, name: str
) -> None:
    mixed = file_for(subjects, model, "OneTrainer for ComfyUI") | file_for(subjects, other, layout)
    with pytest.raises(FileProblem, match=r"^it mixes architectures") as refused:
        subjects[model].match(forge, mixed)
    assert name in str(refused.value)
    assert str(model_of(subjects[model].shapes)) in str(refused.value)


def test_a_hunyuan_file_that_has_fluxs_names_in_part_is_refused(
    forge: Forge, subjects: Mapping[str, Subject]
) -> None:
    """musubi-tuner's names of Hunyuan Video's attention are kohya's of Flux, and the widths agree."""
    state = {
        key.replace("_img_mlp_0", "_img_mlp_fc1").replace("_modulation_lin", "_modulation_linear"): value
        for key, value in file_for(subjects, "Flux", "kohya").items()
    }
    with pytest.raises(FileProblem, match=r"^it mixes architectures: .* of Hunyuan Video"):
        subjects["Flux"].match(forge, state)


def test_a_flux_file_on_chroma_lists_what_chroma_lacks(forge: Forge, subjects: Mapping[str, Subject]) -> None:
    """Chroma is a Flux without modulation; the rest of a Flux file fits it, and people use it so."""
    state = file_for(subjects, "Flux", "kohya")
    match = subjects["Chroma"].match(forge, state)
    lacking = (
        "_mod_lin",
        "_modulation_lin",
        "_adaLN_modulation",
        "_time_in_",
        "_vector_in_",
        "_guidance_in_",
    )
    expected = {key for key in state if any(part in key for part in lacking)}
    assert expected
    assert set(match.unmatched) == expected
    assert len(match.unet) == len({key.partition(".")[0] for key in state.keys() - expected})


def test_bundled_embeddings_and_absent_encoders_are_no_mismatch(
    forge: Forge, subjects: Mapping[str, Subject]
) -> None:
    state = file_for(subjects, "SD 1.5", "kohya") | file_for(subjects, "CLIP-L", "kohya, SD 1.5")
    state |= {"bundle_emb.cat.clip_l": torch.ones(2, 32)}
    match = subjects["SD 1.5"].match(forge, state)
    assert match.unmatched == ()
    assert set(match.without_encoder) == {key for key in state if key.startswith("lora_te_")}


def test_keys_of_no_known_layout_are_listed_and_not_fatal(
    forge: Forge, subjects: Mapping[str, Subject]
) -> None:
    state = file_for(subjects, "Flux", "kohya")
    extra = {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2), "double_blocks.7.surprise": torch.ones(2)}
    match = subjects["Flux"].match(forge, state | extra)
    assert set(match.unmatched) == set(extra)
