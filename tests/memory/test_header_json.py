"""A safetensors header has the entries that a JSON parser finds there; what is of another form is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_precision_lora.memory.header_json import LONGEST_TEXT, Entry, HeaderTextError, parse_header
from lib_precision_lora.memory.tensors import LONGEST_NAME, MOST_AXES, MOST_TENSORS

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAMES = TEXTS.filter(lambda name: name != "__metadata__")
SIZES = st.integers(0, 10**18 - 1)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3"]),
        "shape": st.lists(SIZES, max_size=MOST_AXES),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
).flatmap(lambda entry: st.permutations(list(entry.items())).map(dict))


@settings(max_examples=200, deadline=None)
@given(
    entries=st.dictionaries(NAMES, ENTRIES, max_size=5),
    metadata=st.none() | st.dictionaries(TEXTS, TEXTS),
    ascii_only=st.booleans(),
    spaces=st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]),
    indent=st.sampled_from([None, 1]),
)
def test_what_a_json_parser_finds_is_found(
    entries: dict[str, dict[str, Any]],
    metadata: dict[str, str] | None,
    ascii_only: bool,
    spaces: tuple[str, str],
    indent: int | None,
) -> None:
    whole = {**entries, **({} if metadata is None else {"__metadata__": metadata})}
    text = json.dumps(whole, ensure_ascii=ascii_only, separators=spaces, indent=indent)
    found, texts = parse_header(text.encode())
    assert texts == (metadata or {})
    expected = json.loads(text)
    expected.pop("__metadata__", None)
    assert {
        name: {"dtype": read.dtype, "shape": list(read.shape), "data_offsets": places(read)}
        for name, read in found.items()
    } == expected


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_text_is_refused_or_read_as_a_json_parser_does(data: st.DataObject) -> None:
    text = bytearray(header(f'"a\\"b": {ENTRY}, "__metadata__": {{"k": "v\\\\"}}'))
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.sampled_from(b'{}[]",:\\ 019a\x00\xff'))
    try:
        found, texts = parse_header(bytes(text))
    except HeaderTextError:
        return
    expected = json.loads(text)
    assert texts == expected.pop("__metadata__", {})
    assert {name: list(entry.shape) for name, entry in found.items()} == {
        name: entry["shape"] for name, entry in expected.items()
    }


def places(entry: Entry) -> list[int]:
    return [entry.begin, entry.end]


ENTRY = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


def header(content: str) -> bytes:
    return f"{{{content}}}".encode()


def entry(shape: str = "[1]", **others: str) -> bytes:
    fields = {"dtype": '"F32"', "shape": shape, "data_offsets": "[0, 4]", **others}
    return header('"a": {' + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no JSON object"),
        (b"[]", "no JSON object"),
        (b"{", "no text at its byte 1"),
        (b'{"a"', "nothing stands behind a"),
        (header(f'"a": {ENTRY}') + b"x", "goes on behind its end"),
        (header(f'"a": {ENTRY},'), "no text"),
        (header(f'"a": {ENTRY} "b"'), "does not go on behind a"),
        (header(f'"a": {ENTRY}, "a": {ENTRY}'), "a stands there twice"),
        (header(f'"a": {ENTRY}, "\\u0061": {ENTRY}'), "a stands there twice"),
        (header('"__metadata__": {}, "__metadata__": {}'), "__metadata__ stands there twice"),
        (header('"__metadata__": []'), "no JSON object"),
        (header('"__metadata__": {"a": 1}'), "no text"),
        (header('"__metadata__": {"a": {}}'), "no text"),
        (header(f'"\\ud800": {ENTRY}'), "cannot be read"),
        (header(f'"a\n": {ENTRY}'), "cannot be read"),
        (header(f'"\\x": {ENTRY}'), "cannot be read"),
        (header(f'"{"a" * (LONGEST_NAME + 1)}": {ENTRY}'), f"more than {LONGEST_NAME} bytes"),
        (entry("[01]"), "entry for a"),
        (entry("[1.0]"), "entry for a"),
        (entry("[-1]"), "entry for a"),
        (entry("[1,]"), "entry for a"),
        (entry("[1 1]"), "entry for a"),
        (entry("[true]"), "entry for a"),
        (entry("[" + "1" * 19 + "]"), "entry for a"),
        (entry("[" + "1" * 4200 + "]"), "entry for a"),
        (entry(str([1] * (MOST_AXES + 1))), "entry for a"),
        (entry(data_offsets="[0]"), "entry for a"),
        (entry(data_offsets="[0, 4, 8]"), "entry for a"),
        (entry(dtype="[1]"), "entry for a"),
        (entry(shape='"F32"'), "entry for a"),
        (entry(more="1"), "entry for a"),
        (header('"a": {"dtype": "F32", "shape": [1]}'), "entry for a"),
        (
            header('"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'),
            "entry for a",
        ),
        (header('"a": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}'), "entry for a"),
    ],
)
def test_another_form_is_refused_with_its_place(text: bytes, message: str) -> None:
    with pytest.raises(HeaderTextError) as caught:
        parse_header(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_just_keeps_within_the_bounds_is_read() -> None:
    names = ["a" * LONGEST_NAME, *map(str, range(MOST_TENSORS - 1))]
    text = header(",".join(f'"{name}": {ENTRY}' for name in names))
    entries, metadata = parse_header(text)
    assert (list(entries), metadata) == (names, {})
    with pytest.raises(HeaderTextError, match=f"more than {MOST_TENSORS} tensors"):
        parse_header(text[:-1] + b', "one more": %b}' % ENTRY.encode())
    assert parse_header(entry(str([10**18 - 1] * MOST_AXES)))[0]["a"].shape == (10**18 - 1,) * MOST_AXES
    assert parse_header(b' {"__metadata__": null, "a": %b} \n' % ENTRY.encode())[1] == {}


def test_a_very_long_text_is_passed_over_and_the_next_is_read() -> None:
    texts = {"long": '"' * LONGEST_TEXT, "kept": "\\" * (LONGEST_TEXT // 2), "next": 'a"b'}
    text = json.dumps({"__metadata__": texts})
    assert parse_header(text.encode())[1] == {name: texts[name] for name in ("kept", "next")}
