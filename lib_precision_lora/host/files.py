"""LoRA files, read when they are new or have changed."""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from lib_precision_lora.host.progress import Interrupted, Stage, unshown
from lib_precision_lora.names.architectures import UNNAMED
from lib_precision_lora.ticks import Tick

CHUNK_BYTES = 16 * 2**20
"""What is read between one tick and the next: a fraction of a second, also from a slow disk."""


class FileProblem(ValueError):
    """A LoRA file that cannot be applied: one sentence that names it."""


class FileInterrupted(FileProblem):
    """A LoRA file that the user did not wait for: nothing is wrong with it."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one version of a file from the next."""

    path: str
    size: int
    modified_ns: int

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Raises `FileProblem` where there is no such file."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise FileProblem(f"{Path(path).name} cannot be opened ({error.strerror})") from error
        return cls(path, status.st_size, status.st_mtime_ns)


class FileTensors(dict[str, Tensor]):
    """The tensors of a file; metadata: what its header says besides, as of their scales."""

    metadata: Mapping[str, str]

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


class LoraFiles:
    """State dicts by version of the file, within a bound of RAM; the least recently used one goes first.

    read_other: how the host reads what is no safetensors file (`.pt`, `.ckpt`); limit: the bound in bytes,
    asked for at each reading; stage: where it is shown.
    """

    def __init__(
        self,
        read_other: Callable[[str], Mapping[str, Tensor]],
        limit: Callable[[], int] = lambda: 2**30,
        stage: Stage = unshown,
    ) -> None:
        self._read_other = read_other
        self._limit = limit
        self._stage = stage
        self._kept: OrderedDict[Stamp, Mapping[str, Tensor]] = OrderedDict()

    def read(self, stamp: Stamp) -> Mapping[str, Tensor]:
        """The tensors of the file, on the CPU. Raises `FileProblem` for what cannot be read, and lets
        `Interrupted` pass.

        The bytes are copied, not mapped: a mapped file cannot be written over on Windows, and a training
        that writes over it elsewhere would change tensors in use.
        """
        if stamp in self._kept:
            self._kept.move_to_end(stamp)
            return self._kept[stamp]
        name = Path(stamp.path).name
        metadata: Mapping[str, str] = {}
        try:
            with self._stage(f"LoRA {Path(name).stem}: reading") as tick:
                if name.lower().endswith(".safetensors"):
                    content = content_of(stamp, tick)
                    state_dict: Mapping[str, Tensor] = safetensors.torch.load(content)
                    metadata = metadata_of(content)
                    del content
                else:
                    tick(0, 0)
                    state_dict = self._read_other(stamp.path)
        except Interrupted:
            raise
        except safetensors.SafetensorError as error:
            raise FileProblem(
                f"{name} is no complete safetensors file ({error}): download or copy it again"
            ) from error
        except Exception as error:  # a pickle can fail in any way
            raise FileProblem(f"{name} cannot be read ({error}): download or copy it again") from error
        if isinstance(state_dict, (list, tuple)):
            raise FileProblem(UNNAMED)
        values = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
        tensors = FileTensors(values, metadata)
        if not tensors:
            raise FileProblem(f"{name} holds no tensors: it is no LoRA")
        self._kept[stamp] = tensors
        limit = self._limit()
        while self._kept and self.kept_bytes > limit:
            self._kept.popitem(last=False)
        return tensors

    @property
    def kept_bytes(self) -> int:
        """RAM of the files that are kept."""
        kept = (tensor for file in self._kept.values() for tensor in file.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def clear(self) -> None:
        self._kept.clear()


def metadata_of(content: bytes) -> Mapping[str, str]:
    """What the header of a whole safetensors file says besides its tensors; content: one that was read."""
    size = int.from_bytes(content[:8], "little")
    metadata: Mapping[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    return metadata


def content_of(stamp: Stamp, tick: Tick) -> bytes:
    """The bytes of this version of a file; fewer, where it has been cut off since.

    They exist once: a `BytesIO` that is filled in place hands out its own memory.
    """
    content = io.BytesIO(bytes(stamp.size))
    done = 0
    with open(stamp.path, "rb", buffering=0) as file, content.getbuffer() as room:
        while done < stamp.size:
            tick(done, stamp.size)
            read = file.readinto(room[done : done + CHUNK_BYTES])
            if not read:
                break
            done += read
    content.truncate(done)
    return content.getvalue()
