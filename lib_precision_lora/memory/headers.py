"""What a weight file says about its tensors before the first of them: names, shapes, types, places.

No tensor is read, whatever the size of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from lib_precision_lora.memory.gguf_header import GGUF_MAGIC, read_gguf_header
from lib_precision_lora.memory.safetensors_header import read_safetensors_header
from lib_precision_lora.memory.tensors import Header, HeaderError, StoredTensor

__all__ = ["Header", "HeaderError", "StoredTensor", "read_header"]


def read_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file, told apart by its first bytes.

    Raises `HeaderError`: no such file, a folder, empty, truncated, damaged, or of another type.
    """
    try:
        if not path.is_file():
            raise HeaderError(_no_file(path))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            file.seek(0)
            if start[:4] == GGUF_MAGIC:
                return read_gguf_header(path, file, size)
            return read_safetensors_header(path, file, size)
    except OSError as error:
        raise HeaderError(f"{path}: the file cannot be read: {error.strerror}; check the path.") from error


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path}: it is a folder, not a file; check the path."
    if path.exists():
        return f"{path}: it is no regular file; check the path."
    return f"{path}: there is no such file; check the path."
