"""How much of a file is believed before its tensors are read: more than any trainer writes, and no more.

What is checked against these, or against the file's own size, is checked before memory is taken for it.
"""

from __future__ import annotations

LARGEST_PICKLE = 2**24
"""Bytes of the pickle that describes a torch file's tensors. That of 10,000 tensors has about 2 MB."""

MOST_STEPS = 1_500_000
"""Instructions of that pickle. A tensor takes about 35."""

MOST_ENTRIES = 2**16
"""Entries of a zip archive."""

LARGEST_DIRECTORY = 2**24
"""Bytes of the directory of a zip archive."""

MOST_TENSORS = 2**15

LONGEST_KEY = 512
"""Characters of a tensor's name."""

MOST_AXES = 8

REPEATS = 2
"""Tensors of a torch file may share storages: together they may show so many times the file's bytes."""

CHUNK_BYTES = 16 * 2**20
"""What is read between one tick and the next: a fraction of a second, also from a slow disk."""
