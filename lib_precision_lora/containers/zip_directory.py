"""The directory of a zip archive: where each entry lies. Nothing is unpacked; torch stores its entries as
they are, and what is compressed is refused.

Source: PKWARE's APPNOTE (4.3.7 local header, 4.3.12 directory, 4.3.14 to 4.3.16 its end, 4.5.3 zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from lib_precision_lora.containers.bounds import LARGEST_DIRECTORY, MOST_ENTRIES
from lib_precision_lora.containers.content import ContainerError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL_SHORT, _FULL_LONG = 2**16 - 1, 2**32 - 1
_STORED, _ENCRYPTED, _ZIP64 = 0, 1, 1

DAMAGED = "the archive is truncated or damaged; download or copy it again"


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """offset: of the entry's first byte in the file."""

    name: str
    offset: int
    nbytes: int


def read_directory(file: BinaryIO, size: int) -> dict[str, ZipEntry]:
    """The entries of an archive of this many bytes, by name.

    Raises `ContainerError`: damaged, compressed, too many, or entries that lie over each other.
    """
    count, length, start = _end_of(file, size)
    if count > MOST_ENTRIES or length > LARGEST_DIRECTORY:
        raise ContainerError(
            f"its directory announces {count} entries in {length} bytes, above the limits of {MOST_ENTRIES} "
            f"and {LARGEST_DIRECTORY}"
        )
    if start + length > size:
        raise ContainerError(DAMAGED)
    entries: dict[str, ZipEntry] = {}
    file.seek(start)
    for name, nbytes, local in _listed(file.read(length), count):
        if name in entries:
            raise ContainerError("two of its entries have one name; the file is damaged")
        entries[name] = ZipEntry(name, _behind_local_header(file, local, size), nbytes)
    here = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < here or entry.offset + entry.nbytes > start:
            raise ContainerError(DAMAGED)
        here = entry.offset + entry.nbytes
    return entries


def _end_of(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Entries, bytes and place of the directory."""
    tail_start = max(0, size - _END.size - _FULL_SHORT)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise ContainerError(DAMAGED)
    _, disk, _, _, count, length, start, _ = _END.unpack_from(tail, at)
    if count == _FULL_SHORT or _FULL_LONG in (length, start):
        return _end64_of(file, size, tail_start + at)
    if disk:
        raise ContainerError("it is one part of a divided archive; use the whole file")
    return count, length, start


def _end64_of(file: BinaryIO, size: int, end: int) -> tuple[int, int, int]:
    locator = _record(file, _END64_LOCATOR, end - _END64_LOCATOR.size, size, b"PK\x06\x07")
    record = _record(file, _END64, locator[2], size, b"PK\x06\x06")
    return record[7], record[8], record[9]


def _record(file: BinaryIO, layout: struct.Struct, offset: int, size: int, magic: bytes) -> tuple[int, ...]:
    if not 0 <= offset <= size - layout.size:
        raise ContainerError(DAMAGED)
    file.seek(offset)
    content = file.read(layout.size)
    if len(content) < layout.size or content[:4] != magic:
        raise ContainerError(DAMAGED)
    return layout.unpack(content)


def _listed(directory: bytes, count: int) -> Iterator[tuple[str, int, int]]:
    """Name, bytes and place of the local header of each entry."""
    here = 0
    for _ in range(count):
        if here + _ENTRY.size > len(directory):
            raise ContainerError(DAMAGED)
        fields = _ENTRY.unpack_from(directory, here)
        magic, flags, method, packed, nbytes = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length, local = *fields[10:13], fields[16]
        here += _ENTRY.size
        name = directory[here : here + name_length].decode("utf-8", "replace")
        extra = directory[here + name_length : here + name_length + extra_length]
        here += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or here > len(directory):
            raise ContainerError(DAMAGED)
        nbytes, packed, local = _widened(extra, nbytes, packed, local)
        if method != _STORED or flags & _ENCRYPTED or packed != nbytes:
            raise ContainerError(
                "its entries are compressed or encrypted, as torch never writes them; pack it again with "
                "torch.save, or use it as safetensors"
            )
        yield name, nbytes, local


def _widened(extra: bytes, *values: int) -> list[int]:
    """Sizes and place, where those of the entry are full, from its zip64 field."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == _ZIP64:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    found = []
    for value in values:
        if value == _FULL_LONG:
            if len(wide) < 8:
                raise ContainerError(DAMAGED)
            (value,) = struct.unpack_from("<Q", wide)
            wide = wide[8:]
        found.append(value)
    return found


def _behind_local_header(file: BinaryIO, local: int, size: int) -> int:
    fields = _record(file, _LOCAL, local, size, b"PK\x03\x04")
    return local + _LOCAL.size + fields[9] + fields[10]
