"""Text that comes from elsewhere, made safe to show.

Names in prompts, of files and of keys are chosen by whoever wrote them. In a console they could forge lines
of the log or drive the terminal, in a page they could be elements of HTML. Whatever leaves the library passes
through here, at the place where it leaves:

    console     `PlainLog` on the logger; `plain_lines` and `plain_json` in the command line
    page        `plain` in the templates, which escape HTML themselves; `page_text` for the host's pop-ups
    infotext    `plain`
    a client    `plain` for sentences; names in JSON stay as they are, JSON has its own escapes
"""

from __future__ import annotations

import html
import json
import logging
import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST_WORD = 400
"""Characters without a space between that are shown; a name on disk has 255 at most."""

LONGEST_SENTENCE = 4000
"""Characters of a message in a page or an infotext."""

_FORMATTER = logging.Formatter()


def plain(value: object, longest: int | None = None) -> str:
    """One line of visible characters.

    What is not visible (line ends, ANSI escapes, marks that turn the direction of writing, halves of
    surrogate pairs) stands as Python writes it: `\\n`, `\\x1b`, `\\u202e`. Spaces of every kind stay. Words
    beyond `LONGEST_WORD` lose their middle, and the whole what goes beyond `longest` characters.
    """
    text = _with_short_words(str(value))
    if not text.isprintable():
        text = _with_short_words("".join(char if _visible(char) else _escaped(char) for char in text))
    return text if longest is None or len(text) <= longest else f"{text[: longest - 1]}…"


def sentence(value: object) -> str:
    """A message for a page, an infotext or a client: plain, and of bounded length."""
    return plain(value, LONGEST_SENTENCE)


def page_text(value: object) -> str:
    """A message for a pop-up of the page, which takes it for the content of an element of HTML."""
    return html.escape(sentence(value), quote=False)


def plain_lines(lines: Iterable[str]) -> str:
    """Lines of a report, each of them plain, and each ended."""
    return "".join(f"{plain(line)}\n" for line in lines)


def plain_json(value: Any) -> str:
    """JSON for a console: `json.loads` gives every string back as it was."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(char if char == "\n" or _visible(char) else _json_escaped(char) for char in text)


class PlainLog(logging.Filter):
    """Makes every record of a logger plain, whoever shows it then. A traceback stays many lines, indented, so
    that none of them passes for a line of the log."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = plain(record.getMessage()), ()
        if record.exc_info:  # also where another handler has cached it as it was
            trace = _FORMATTER.formatException(record.exc_info)
            record.exc_text = "\n".join(f"    {plain(line)}" for line in trace.split("\n"))
        return True


def _visible(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def _json_escaped(char: str) -> str:
    return json.dumps(char)[1:-1] if char != "\x7f" else "\\u007f"


def _with_short_words(text: str) -> str:
    return text if len(text) <= LONGEST_WORD else " ".join(map(_shortened, text.split(" ")))


def _shortened(word: str) -> str:
    if len(word) <= LONGEST_WORD:
        return word
    half = LONGEST_WORD // 2
    return f"{word[:half]}…({len(word) - 2 * half} more)…{word[-half:]}"
