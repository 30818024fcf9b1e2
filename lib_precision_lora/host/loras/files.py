"""LoRA files, read when they are new or have changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lib_precision_lora.containers import ContainerError, LoraContent, PickleError, read_open
from lib_precision_lora.host.generation.progress import Stage, unshown

SAMPLE_BYTES = 4096
"""What is looked at of a file at each of its start, its middle and its end, to tell it from another."""


class FileProblem(ValueError):
    """A LoRA file that cannot be applied: one sentence that names it."""


class FileInterrupted(FileProblem):
    """A LoRA file that the user did not wait for: nothing is wrong with it."""


class PickleProblem(FileProblem):
    """A LoRA file that is, or holds, what nothing is read of here."""


@dataclass(frozen=True, slots=True)
class FileDigests:
    """Of the bytes that were read: of all of them, and what the WebUI lists (`LoraContent.listed_digest`)."""

    digest: str
    listed: str


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one version of a file from the next, without reading it.

    A copy may keep size and time of what it replaces (`cp -p`). It has another inode, or its time of change
    (`ctime`) is a later one; on Windows, which keeps the time of creation there, its samples differ.
    """

    path: str
    size: int
    modified_ns: int
    changed_ns: int = 0
    inode: tuple[int, int] = (0, 0)
    samples: bytes = b""

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Raises `FileProblem` where there is no such file, or one that is no file of bytes."""
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for whoever writes to it
                raise FileProblem(f"{Path(path).name} is no regular file; replace it, or take it away")
            with open(path, "rb", buffering=0) as file:
                return cls.of_open(path, file)
        except OSError as error:
            raise _cannot_open(path, error) from error

    @classmethod
    def of_open(cls, path: str, file: BinaryIO) -> Stamp:
        """Leaves the file at its start."""
        status = os.fstat(file.fileno())
        samples = hashlib.sha256()
        for place in sorted({0, status.st_size // 2, max(0, status.st_size - SAMPLE_BYTES)}):
            file.seek(place)
            samples.update(file.read(SAMPLE_BYTES))
        file.seek(0)
        return cls(
            path,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            (status.st_dev, status.st_ino),
            samples.digest(),
        )


class LoraFiles:
    """What files hold, by version of the file, within a bound of RAM; the least recently used one goes first.

    read_other: of no use any more, as every kind of file is read here; limit: the bound in bytes, asked for
    at each reading; stage: where a reading is shown; digests: of all versions that were read, also of those
    that are not kept any more.
    """

    def __init__(
        self, read_other: object = None, limit: Callable[[], int] = lambda: 2**30, stage: Stage = unshown
    ) -> None:
        self._limit = limit
        self._stage = stage
        self._kept: OrderedDict[Stamp, LoraContent] = OrderedDict()
        self.digests: dict[Stamp, FileDigests] = {}

    def read(self, stamp: Stamp, pickles: bool = True) -> LoraContent:
        """The tensors of this version of the file, on the CPU.

        pickles: False where nothing is to be read of a pickled file, unless it is here already. Raises
        `FileProblem` for what cannot be read, and lets `Interrupted` pass.
        """
        if stamp in self._kept:
            self._kept.move_to_end(stamp)
            return self._kept[stamp]
        name = Path(stamp.path).name
        try:
            with self._stage(f"LoRA {Path(name).stem}: reading") as tick, open(stamp.path, "rb") as file:
                tick(0, stamp.size)
                if Stamp.of_open(stamp.path, file) != stamp:
                    raise FileProblem(_changed(name))
                content = read_open(name, file, tick, pickles)
                if Stamp.of_open(stamp.path, file) != stamp:
                    raise FileProblem(_changed(name))
        except PickleError as error:
            raise PickleProblem(f"{name}: {error}") from error
        except ContainerError as error:
            raise FileProblem(f"{name}: {error}") from error
        except OSError as error:
            raise _cannot_open(stamp.path, error) from error
        if not content:
            raise FileProblem(f"{name} holds no tensors: it is no LoRA")
        self.digests[stamp] = FileDigests(content.digest, content.listed_digest)
        self._kept[stamp] = content
        limit = self._limit()
        while self._kept and self.kept_bytes > limit:
            self._kept.popitem(last=False)
        return content

    @property
    def kept_bytes(self) -> int:
        """RAM of the files that are kept."""
        return sum(content.held_bytes for content in self._kept.values())

    def clear(self) -> None:
        self._kept.clear()
        self.digests.clear()


def _cannot_open(path: str, error: OSError) -> FileProblem:
    return FileProblem(
        f"{Path(path).name} cannot be opened ({error.strerror}); check the file and its folder"
    )


def _changed(name: str) -> str:
    return f"{name} was changed while it was being read; the next generation reads it again"
