"""Bytes that were in order, and are not any more."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

LENGTHS = (
    *(0, 1, 2, 7, 8, 31, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
"""Numbers at which a length is read as another one, or as a very large one."""

FORMS = ("<B", "<H", "<I", "<Q")
MOST_BYTES = 2**20


def mutated(random: Random, content: bytes, words: Sequence[bytes] = ()) -> bytes:
    """Changed in one to four places. words: of the format, to be written over or in between."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        random.choice(_CHANGES)(random, changed)
        if words and random.random() < 0.3:
            _put_word(random, changed, words)
    return bytes(changed[:MOST_BYTES])


def _place(random: Random, content: bytearray) -> int:
    """Near the start half of the time: there the headers are."""
    end = len(content) if random.random() < 0.5 else min(len(content), 256)
    return random.randrange(end + 1)


def _flip(random: Random, content: bytearray) -> None:
    for _ in range(random.randint(1, 8) if content else 0):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def _truncate(random: Random, content: bytearray) -> None:
    del content[_place(random, content) :]


def _extend(random: Random, content: bytearray) -> None:
    content.extend(random.randbytes(random.choice((1, 7, 64, 4096))))


def _write_length(random: Random, content: bytearray) -> None:
    place, form = _place(random, content), random.choice(FORMS)
    number = random.choice((*LENGTHS, len(content), len(content) - place)) % (1 << 8 * struct.calcsize(form))
    written = struct.pack(form, number)
    content[place : place + len(written)] = written


def _delete(random: Random, content: bytearray) -> None:
    place = _place(random, content)
    del content[place : place + random.choice((1, 2, 8, 100))]


def _repeat(random: Random, content: bytearray) -> None:
    place = _place(random, content)
    piece = bytes(content[place : place + random.choice((1, 2, 8, 100))])
    room = MOST_BYTES // max(1, len(piece))
    content[place:place] = piece * min(room, random.choice((1, 2, 10, 1000, 100_000)))


def _exchange(random: Random, content: bytearray) -> None:
    length = random.choice((1, 4, 8, 32))
    first, second = _place(random, content), _place(random, content)
    one, other = bytes(content[first : first + length]), bytes(content[second : second + length])
    content[first : first + length], content[second : second + length] = other, one


def _overwrite(random: Random, content: bytearray) -> None:
    place = _place(random, content)
    filling = random.choice((b"\x00", b"\xff", b"[", b"{", b"]", b"9", b"\x80", b"\n"))
    length = random.choice((1, 8, 100, 1000))
    content[place : place + length] = filling * length


def _put_word(random: Random, content: bytearray, words: Sequence[bytes]) -> None:
    """In the place of another word, or anywhere."""
    word, other = random.choice(words), random.choice(words)
    place = content.find(other, _place(random, content))
    if place >= 0:
        content[place : place + len(other)] = word
    else:
        place = _place(random, content)
        content[place : place + random.choice((0, len(word)))] = word


_CHANGES: tuple[Callable[[Random, bytearray], None], ...] = (
    *(_flip, _flip, _truncate, _extend, _write_length, _write_length),
    *(_delete, _repeat, _exchange, _overwrite),
)
