"""LoRA files, read when they are new or have changed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor


class FileProblem(ValueError):
    """A LoRA file that cannot be applied: one sentence that names it."""


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


class LoraFiles:
    """State dicts by version of the file, within a bound of RAM; the least recently used one goes first.

    read_other: how the host reads what is no safetensors file (`.pt`, `.ckpt`); limit: the bound in bytes,
    asked for at each reading.
    """

    def __init__(
        self, read_other: Callable[[str], Mapping[str, Tensor]], limit: Callable[[], int] = lambda: 2**30
    ) -> None:
        self._read_other = read_other
        self._limit = limit
        self._kept: OrderedDict[Stamp, Mapping[str, Tensor]] = OrderedDict()

    def read(self, stamp: Stamp) -> Mapping[str, Tensor]:
        """The tensors of the file, on the CPU. Raises `FileProblem` for what cannot be read.

        The bytes are copied, not mapped: a mapped file cannot be written over on Windows, and a training
        that writes over it elsewhere would change tensors in use.
        """
        if stamp in self._kept:
            self._kept.move_to_end(stamp)
            return self._kept[stamp]
        name = Path(stamp.path).name
        try:
            if stamp.path.lower().endswith(".safetensors"):
                state_dict: Mapping[str, Tensor] = safetensors.torch.load(Path(stamp.path).read_bytes())
            else:
                state_dict = self._read_other(stamp.path)
        except safetensors.SafetensorError as error:
            raise FileProblem(
                f"{name} is no complete safetensors file ({error}): download or copy it again"
            ) from error
        except Exception as error:  # a pickle can fail in any way
            raise FileProblem(f"{name} cannot be read ({error}): download or copy it again") from error
        tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
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
