"""Numbers, texts and arrays of a GGUF header, one after the other, each of a bounded size."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lib_precision_lora.memory.tensors import LONGEST_NAME, MOST_AXES, HeaderError, shortened

DEEPEST_ARRAY = 4
LARGEST_HEADER = 32 * 2**20
"""A damaged count would have us read on through the data; tokenizers take a few MiB."""

PIECE = 2**18
"""Bytes that are read at a time."""

MOST_ITEMS = 2**20
"""Values in the metadata's arrays, but for numbers. The largest tokenizers have some 800,000 texts."""

LONGEST_TEXT = 2**16
"""Longer texts of the metadata are passed over."""

KEPT_ITEMS = 16
"""Longer arrays (a tokenizer's words) are passed over."""

NUMBERS: Mapping[int, struct.Struct] = {
    number: struct.Struct(f"<{form}")
    for number, form in (
        *((0, "B"), (1, "b"), (2, "H"), (3, "h"), (4, "I"), (5, "i"), (6, "f"), (7, "?")),
        *((10, "Q"), (11, "q"), (12, "d")),
    )
}
"""A metadata value's type number → its form."""

U32, U64 = NUMBERS[4], NUMBERS[10]
STRING, ARRAY = 8, 9


class Cursor:
    """Reads a file from its start, piece by piece, and knows where it ends."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size
        self._read = bytearray()
        self._items = 0
        self.position = 0

    def take(self, count: int) -> bytes:
        start = self._advance(count)
        return bytes(self._read[start : self.position])

    def number(self, form: struct.Struct) -> Any:
        return form.unpack_from(self._read, self._advance(form.size))[0]

    def name(self) -> str:
        length = self.number(U64)
        if length > LONGEST_NAME:
            self._require(self.position + length)
            raise HeaderError(
                f"{self._path}: a name in its header has {length} bytes, more than {LONGEST_NAME}; the file "
                "is damaged."
            )
        return self.take(length).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """One metadata value; None for a long array, and for a long text."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            length = self.number(U64)
            if length <= LONGEST_TEXT:
                return self.take(length).decode("utf-8", "replace")
            self._advance(length)
            return None
        if kind != ARRAY or depth == DEEPEST_ARRAY:
            raise HeaderError(
                f"{self._path}: its metadata has a value of the unknown type {kind}; the file is damaged or "
                "of a newer format."
            )
        item, count = self.number(U32), self.number(U64)
        if item in NUMBERS and count > KEPT_ITEMS:
            self._advance(count * NUMBERS[item].size)
            return None
        self._items += count
        if self._items > MOST_ITEMS:
            raise HeaderError(
                f"{self._path}: its metadata lists more than {MOST_ITEMS} values; the file is damaged."
            )
        if item == STRING and count > KEPT_ITEMS:
            self._pass_texts(count)
            return None
        kept = [self.value(item, depth + 1) for _ in range(count)]
        return kept if count <= KEPT_ITEMS else None

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, sizes (columns first), type and offset."""
        name, axes = self.name(), self.number(U32)
        if axes > MOST_AXES:
            raise HeaderError(f"{self._path}: {shortened(name)} has {axes} axes; the file is damaged.")
        sizes = tuple(self.number(U64) for _ in range(axes))
        return name, sizes, self.number(U32), self.number(U64)

    def _pass_texts(self, count: int) -> None:
        for _ in range(count):
            self._advance(self.number(U64))

    def _advance(self, count: int) -> int:
        """The position before the next so many bytes, which are then read. Raises `HeaderError`."""
        start, end = self.position, self.position + count
        if end > len(self._read):
            self._require(end)
            self._read += self._file.read(max(PIECE, end - len(self._read)))
            if end > len(self._read):
                self._truncated()
        self.position = end
        return start

    def _require(self, end: int) -> None:
        if end > self._size:
            self._truncated()
        if end > LARGEST_HEADER:
            raise HeaderError(
                f"{self._path}: its header goes beyond {LARGEST_HEADER} bytes; the file is damaged, download "
                "it again."
            )

    def _truncated(self) -> NoReturn:
        raise HeaderError(
            f"{self._path}: the file is truncated: its header goes beyond its {self._size} bytes; "
            "download it again."
        )
