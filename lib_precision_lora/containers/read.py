"""Any LoRA file, told apart by its first bytes, whatever its name ends in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lib_precision_lora.containers.content import ContainerError, LoraContent, PickleError
from lib_precision_lora.containers.safetensors_file import read_safetensors
from lib_precision_lora.containers.torch_file import ARCHIVE_MAGIC, PICKLE_MAGIC, read_archive, read_old
from lib_precision_lora.memory.gguf_header import GGUF_MAGIC
from lib_precision_lora.memory.safetensors_header import LARGEST_JSON
from lib_precision_lora.ticks import Tick, untold


def read_lora(path: Path, tick: Tick = untold, pickles: bool = True) -> LoraContent:
    """Every tensor of the file, copied, on the CPU.

    pickles: False where files of `torch.save` are refused unread. The bytes are copied, not mapped: a mapped
    file cannot be written over on Windows, and a training that writes over it elsewhere would change tensors
    in use.
    Raises `ContainerError`, with a reason and no path in it, `OSError` where the file cannot be opened or
    read, and what the tick raises.
    """
    with path.open("rb") as file:
        return read_open(path.name, file, tick, pickles)


def read_open(name: str, file: BinaryIO, tick: Tick = untold, pickles: bool = True) -> LoraContent:
    """The same of a file that is open; name: for messages."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    file.seek(0)
    try:
        if size == 0:
            raise ContainerError("the file is empty; download or copy it again")
        if start[:4] == ARCHIVE_MAGIC or _is_pickle(start):
            if not pickles:
                raise PickleError(
                    "it is a pickled file, of which nothing is read here; use it as safetensors"
                )
            return (read_archive if start[:4] == ARCHIVE_MAGIC else read_old)(file, size, tick)
        if start[:4] == GGUF_MAGIC:
            raise ContainerError("it is a GGUF file, in which no LoRA is read; use it as safetensors")
        if start.lstrip()[:1] == b"<":
            raise ContainerError("it is a web page, saved under a LoRA's name; download the file itself")
        return read_safetensors(name, file, size, tick)
    except (MemoryError, RuntimeError) as error:
        raise ContainerError(
            f"there is no memory for its {size} bytes ({type(error).__name__}); close other programs, or use "
            "a smaller file"
        ) from error


def _is_pickle(start: bytes) -> bool:
    """The first byte alone may also be that of a safetensors header's length."""
    return start[:1] == PICKLE_MAGIC and int.from_bytes(start, "little") > LARGEST_JSON
