"""The JSON of a safetensors header, read entry by entry and no further than its form goes.

    {"__metadata__": {text: text, …}, name: {"dtype": text, "shape": [n, …], "data_offsets": [n, n]}, …}

A JSON parser builds whatever stands there before anyone can look at it: lists of lists, numbers of thousands
of digits. Here everything that is kept has a largest size, and the first byte that is not of this form ends
the reading. Time and memory are those of the text, which the caller bounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lib_precision_lora.memory.tensors import LONGEST_NAME, MOST_AXES, MOST_TENSORS, shortened

LONGEST_TEXT = 2**20
"""Longer texts of the metadata are passed over."""

METADATA = "__metadata__"
_SPACE = rb"[ \t\n\r]*"
_OPEN = re.compile(_SPACE + rb"\{" + _SPACE)
_CLOSE = re.compile(_SPACE + rb"\}")
_COLON = re.compile(_SPACE + rb":" + _SPACE)
_NEXT = re.compile(_SPACE + rb"([,}])" + _SPACE)
_NULL = re.compile(rb"null")
_FIELD = re.compile(
    rb'"(dtype|shape|data_offsets)"' + _SPACE + rb":" + _SPACE
    + rb'(?:"([A-Za-z0-9_]{1,16})"|\[([0-9, \t\n\r]{0,256})\])' + _SPACE + rb"([,}])" + _SPACE
)  # fmt: skip
_SIZE = re.compile(_SPACE + rb"(0|[1-9][0-9]{0,17})" + _SPACE)
_FORM = f"not its type, at most {MOST_AXES} sizes of at most 18 digits, and where its data is"


class HeaderTextError(ValueError):
    """The text is not of this form; a clause that says where."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: name of its type, sizes, first and last byte of its data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_header(text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors by name, and the metadata. Raises `HeaderTextError`."""
    reader = _Reader(text)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    for name in reader.names():
        if name in entries or (name == METADATA and metadata is not None):
            raise HeaderTextError(f"{name} stands there twice")
        if name == METADATA:
            metadata = reader.metadata()
            continue
        if len(entries) == MOST_TENSORS:
            raise HeaderTextError(f"it lists more than {MOST_TENSORS} tensors")
        entries[name] = reader.entry(name)
    reader.end()
    return entries, metadata or {}


class _Reader:
    """A position in the text.

    _plain: the text without the escapes in its strings, every other byte in its place, so that each quotation
    mark begins or ends a string.
    """

    def __init__(self, text: bytes) -> None:
        self._text = self._plain = text
        if b"\\" in text:
            self._plain = text.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._position = 0

    def names(self) -> Iterator[str]:
        """The names in an object; whoever asks for the next one has read what stands behind the last."""
        if not self._passes(_OPEN):
            raise HeaderTextError("it is no JSON object")
        if self._passes(_CLOSE):
            return
        while True:
            name = self._string(LONGEST_NAME)
            if name is None:
                raise HeaderTextError(f"a name in it has more than {LONGEST_NAME} bytes")
            if not self._passes(_COLON):
                raise HeaderTextError(f"nothing stands behind {shortened(name)}")
            yield name
            following = _NEXT.match(self._plain, self._position)
            if following is None:
                raise HeaderTextError(f"it does not go on behind {shortened(name)}")
            self._position = following.end()
            if following[1] == b"}":
                return

    def entry(self, name: str) -> Entry:
        if not self._passes(_OPEN):
            raise HeaderTextError(f"the entry for {shortened(name)} is no object")
        dtype: str | None = None
        sizes: dict[bytes, tuple[int, ...]] = {}
        while True:
            field = _FIELD.match(self._text, self._position)
            if field is None or field[1] in sizes or (field[1] == b"dtype") == (field[2] is None):
                raise HeaderTextError(f"the entry for {shortened(name)} is {_FORM}")
            if field[2] is not None:
                dtype = field[2].decode("ascii")
            sizes[field[1]] = () if field[3] is None else self._sizes(name, field[3])
            # _FIELD ends with spaces, also behind the entry, where `names` looks for the next one.
            self._position = field.end(4) if field[4] == b"}" else field.end()
            if field[4] == b"}":
                break
        shape, places = sizes.get(b"shape"), sizes.get(b"data_offsets", ())
        if dtype is None or shape is None or len(shape) > MOST_AXES or len(places) != 2:
            raise HeaderTextError(f"the entry for {shortened(name)} is {_FORM}")
        return Entry(dtype, shape, *places)

    def metadata(self) -> dict[str, str]:
        """Texts by name, but for those that are very long."""
        if self._passes(_NULL):
            return {}
        found: dict[str, str] = {}
        for count, name in enumerate(self.names()):
            if count == MOST_TENSORS:
                raise HeaderTextError(f"its metadata has more than {MOST_TENSORS} texts")
            text = self._string(LONGEST_TEXT)
            if text is not None:
                found[name] = text
        return found

    def end(self) -> None:
        if self._text[self._position :].strip(b" \t\n\r"):
            raise HeaderTextError("it goes on behind its end")

    def _string(self, longest: int) -> str | None:
        """The string that begins here; None for one of more bytes, which is passed over."""
        start = self._position
        stop = self._plain.find(b'"', start + 1) if self._plain[start : start + 1] == b'"' else -1
        if stop < 0:
            raise HeaderTextError(f"there is no text at its byte {start}")
        self._position = stop + 1
        if stop - start - 1 > longest:
            return None
        try:
            string = json.loads(self._text[start : stop + 1].decode("utf-8"))
            assert isinstance(string, str)
            string.encode("utf-8")
        except ValueError as error:
            raise HeaderTextError(f"the text at its byte {start} cannot be read: {error}") from error
        return string

    def _sizes(self, name: str, content: bytes) -> tuple[int, ...]:
        if not content.strip(b" \t\n\r"):
            return ()
        found = [_SIZE.fullmatch(part) for part in content.split(b",")]
        if None in found:
            raise HeaderTextError(f"the entry for {shortened(name)} is {_FORM}")
        return tuple(int(size[1]) for size in found if size is not None)

    def _passes(self, form: re.Pattern[bytes]) -> bool:
        match = form.match(self._plain, self._position)
        if match is not None:
            self._position = match.end()
        return match is not None
