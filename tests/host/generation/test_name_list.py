"""Names in an image's parameters are read back as they were written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_precision_lora.host.generation.name_list import joined, separated
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED, Notices

AWKWARD = ("cats, dogs", "cats,", '"cats"', 'the "best", they say', "a\\b", "c:d", "", " cats", "a\nb", ",")


@given(st.lists(st.text() | st.sampled_from(AWKWARD)))
def test_every_list_of_names_is_read_back(names: list[str]) -> None:
    assert separated(joined(names)) == names


def through_a_webui(line: str) -> str:
    """A value as WebUIs write it into an image's parameters and read it from there: `quote` and `unquote`."""
    written = json.dumps(line, ensure_ascii=False) if set(line) & set(",:\n") else line
    quoted = len(written) > 1 and written.startswith('"') and written.endswith('"')
    return str(json.loads(written)) if quoted else written


@given(st.lists(st.text() | st.sampled_from(AWKWARD)))
def test_every_list_of_names_is_read_back_from_an_image(names: list[str]) -> None:
    assert separated(through_a_webui(joined(names))) == names


@pytest.mark.parametrize("name", ['"cats"', "cats ", "", '"', 'the "best"', '"cats'])
def test_one_name_alone_keeps_the_quotes_that_a_webui_would_take_off(name: str) -> None:
    assert through_a_webui(json.dumps(name)) == name
    assert separated(through_a_webui(joined([name]))) == [name]


@pytest.mark.parametrize("names", [["cats"], ["cats", "dogs"], ["a: b", "c\\d", "猫"]])
def test_names_that_cannot_be_mistaken_are_written_as_they_are(names: list[str]) -> None:
    assert joined(names) == ", ".join(names)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("", []),
        ("cats, dogs", ["cats", "dogs"]),
        ("cats,,dogs,", ["cats", "dogs"]),
        ('"cats', ['"cats']),
        ('"cats" and, dogs', ['"cats" and', "dogs"]),
        (r'"\x", dogs', [r'"\x"', "dogs"]),
    ],
)
def test_a_line_of_another_version_is_read_as_far_as_it_goes(line: str, names: list[str]) -> None:
    assert separated(line) == names


def test_what_is_left_out_in_a_second_pass_joins_names_with_commas_of_the_first() -> None:
    notices, parameters = Notices(), {}
    for name in ("cats, big", "dogs", "cats, big"):
        notices.begin()
        notices.problem(name, f"LoRA {name} was left out")
        notices.show([].append, parameters)
    assert parameters[INFOTEXT_SKIPPED] == '"cats, big", dogs'
    assert separated(parameters[INFOTEXT_SKIPPED]) == ["cats, big", "dogs"]
