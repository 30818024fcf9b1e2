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
from lib_precision_lora.branch.compose import Reordered, effective_weights
from lib_precision_lora.branch.patch import Patch
from lib_precision_lora.host.matching import FileMatch, KeyMap, key_map_of, match_file
from tests import trainer_names
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import TINY_MODELS, Tiny
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
        weights = effective_weights(self.tiny.model, ours, Reordered())
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
