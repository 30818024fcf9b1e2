"""Foreign text in a console, a page and JSON: nothing in it acts, and what is harmless stays as it is."""

from __future__ import annotations

import io
import json
import logging
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib_precision_lora.plain_text import (
    LONGEST_SENTENCE,
    LONGEST_WORD,
    PlainLog,
    page_text,
    plain,
    plain_json,
    plain_lines,
    sentence,
)

HOSTILE = {
    "a forged line": ("cats\n[Precision LoRA] all is well", r"cats\n[Precision LoRA] all is well"),
    "a carriage return": ("cats\rdogs", r"cats\rdogs"),
    "ANSI": ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    "ANSI of eight bits": ("\x9b31m", r"\x9b31m"),
    "backspace, delete": ("cats\x08\x7f", r"cats\x08\x7f"),
    "NUL": ("cats\x00", r"cats\x00"),
    "line separators": ("a\x85b\u2028c\u2029d", r"a\x85b\u2028c\u2029d"),
    "right to left": ("cats\u202egpj.exe", r"cats\u202egpj.exe"),
    "isolates": ("\u2066cats\u2069", r"\u2066cats\u2069"),
    "nothing to see": ("ca\u200bts\ufeff", r"ca\u200bts\ufeff"),
    "tags": ("cats\U000e0041", r"cats\U000e0041"),
    "half a surrogate pair": ("cats\udcff", r"cats\udcff"),
}
"""What it does → (the text, what is shown)."""

HARMLESS = (
    "plain words, 1.5 × 10⁻³, “quoted”, C:\\Loras\\cats.safetensors",
    "猫猫\u3000LoRA",
    "γάτα كلب हिन्दी",
    "e\u0301té naïve",
    "🐈🐈‍⬛".replace("\u200d", ""),
    "no-break\u00a0space",
    "",
)

ANY = st.text(st.characters(exclude_categories=()), max_size=60)
"""Every code point, halves of surrogate pairs included."""


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_what_acts_on_a_console_is_written_out(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_harmless_stays_as_it_is(text: str) -> None:
    assert plain(text) == text
    assert page_text(text) == text


@given(ANY)
@example("x\x1b" * LONGEST_WORD)
@example("\u202e" * LONGEST_WORD)
def test_plain_text_is_one_visible_line_that_stays_as_it_is(text: str) -> None:
    shown = plain(text)
    categories = {unicodedata.category(char) for char in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1
    assert shown.encode().decode() == shown
    assert plain(shown) == shown


def test_a_word_without_end_loses_its_middle_and_a_sentence_its_end() -> None:
    shown = plain("a" * 10_000_000)
    assert len(shown) <= LONGEST_WORD + 50
    assert "9999600 more" in shown
    assert plain("a" * LONGEST_WORD) == "a" * LONGEST_WORD
    assert len(sentence("so many words " * 10_000)) == LONGEST_SENTENCE


class Elements(HTMLParser):
    """tags and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@given(ANY)
@example("<img src=x onerror=alert(1)>")
@example("&lt;script&gt;</p><!--")
def test_in_a_page_it_is_the_text_of_one_element(text: str) -> None:
    read = Elements(page_text(text))
    assert read.tags == []
    assert read.text == sentence(text)


@given(st.dictionaries(ANY, ANY | st.lists(ANY), max_size=4))
def test_json_for_a_console_gives_every_string_back(value: dict[str, object]) -> None:
    shown = plain_json(value)
    assert json.loads(shown) == json.loads(json.dumps(value))
    assert all(plain(line) == line or len(line) > LONGEST_WORD for line in shown.split("\n"))


def test_lines_of_a_report_are_as_many_as_were_given() -> None:
    shown = plain_lines(text for text, _ in HOSTILE.values())
    assert shown == "".join(f"{expected}\n" for _, expected in HOSTILE.values())
    assert plain_lines([]) == ""


@pytest.mark.parametrize("name", ["", ".branch.session.session"])
def test_a_log_shows_no_line_that_is_not_its_own(name: str) -> None:
    """Also of a logger below the one that has the filter, whose handlers must have it too."""
    shown, logger = io.StringIO(), logging.getLogger("plain_text_test")
    handler = logging.StreamHandler(shown)
    handler.setFormatter(logging.Formatter("[LOG] %(message)s"))
    handler.addFilter(PlainLog())
    logger.addFilter(PlainLog())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        raise ValueError("a key\n[LOG] forged \x1b[31mred")
    except ValueError as error:
        logging.getLogger(logger.name + name).exception("LoRA %s failed: %s", "ca\nts", error)
    finally:
        logger.handlers.clear()
        logger.filters.clear()
    lines = shown.getvalue().splitlines()
    assert lines[0] == r"[LOG] LoRA ca\nts failed: a key\n[LOG] forged \x1b[31mred"
    assert len(lines) > 3
    assert all(line.startswith("    ") for line in lines[1:])
    assert "\x1b" not in shown.getvalue()
    assert lines[-1].strip() == r"[LOG] forged \x1b[31mred"
