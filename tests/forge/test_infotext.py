"""What we write into an image's parameters, written and read by a real Forge."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from lib_precision_lora import __version__
from lib_precision_lora.host.generation.infotext import (
    LOW_BITS,
    MARK,
    MODE,
    Pasted,
    parameters,
    read_parameters,
)
from lib_precision_lora.host.generation.name_list import joined, separated
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.ui.choices import AS_SET
from tests.forge.real_forge import Forge

CHOICES = (AS_SET, "bnb-nf4")


@pytest.fixture
def utils(forge: Forge) -> Any:
    return importlib.import_module("modules.infotext_utils")


def read_back(utils: Any, ours: dict[str, str]) -> dict[str, str]:
    """As the WebUI writes a line of parameters, and reads it again."""
    line = {"Steps": 20, "Sampler": "Euler", "Seed": 1, **ours, "Version": "f2.0.1"}
    text = ", ".join(f"{name}: {utils.quote(value)}" for name, value in line.items())
    return dict(utils.parse_generation_parameters(f"a cat\n{text}", []))


def test_the_mark_and_choices_are_read_back_and_pasted(utils: Any) -> None:
    for written, pasted in (
        (parameters("Automatic", AS_SET, True), Pasted()),
        (parameters("fp16", AS_SET, True), Pasted(True, compute="fp16")),
        (parameters("fp32", "bnb-nf4", True), Pasted(True, "bnb-nf4", "fp32")),
    ):
        found = read_back(utils, written)
        assert {name: found[name] for name in written} == written
        assert found[MARK] == __version__
        assert (found["Steps"], found["Version"]) == ("20", "f2.0.1")
        assert read_parameters(found, CHOICES) == pasted


def test_an_image_of_stock_forge_has_none_of_it(utils: Any) -> None:
    found = read_back(utils, {})
    assert not {MARK, MODE, LOW_BITS, INFOTEXT_SKIPPED} & found.keys()
    assert read_parameters(found, CHOICES) == Pasted()


@pytest.mark.parametrize(
    "names",
    [
        ["cats"],
        ["cats", "dogs"],
        ["cats, big", "dogs"],
        ["cats, big"],
        ['the "best", they say', "a: b"],
        ["a\nb", "c\\d"],
        ["512x512", "dogs"],
    ],
)
def test_names_of_files_that_were_left_out_are_read_back(utils: Any, names: list[str]) -> None:
    found = read_back(utils, {**parameters("fp16", AS_SET, True), INFOTEXT_SKIPPED: joined(names)})
    assert separated(found[INFOTEXT_SKIPPED]) == names
    assert read_parameters(found, CHOICES) == Pasted(True, compute="fp16")


def test_one_that_is_named_like_a_size_is_tolerated(utils: Any) -> None:
    found = read_back(utils, {INFOTEXT_SKIPPED: joined(["512x512"])})
    assert INFOTEXT_SKIPPED not in found, "the WebUI takes it for a size"
    assert read_parameters(found, CHOICES) == Pasted()
