"""A LoRA file, and one in use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


class NetworkOnDisk:
    """A file of the LoRA folder."""

    def __init__(self, name: str, filename: str) -> None:
        self.name, self.filename, self.alias = name, filename, name
        self.metadata: dict[str, Any] = {}
        self.hash: str | None = None
        self.shorthash: str | None = None
        os.stat(filename)

    def set_hash(self, v: str, /) -> None:
        """Each host has another name for it."""
        self.hash, self.shorthash = v, v[:12]

    def read_hash(self) -> None:
        if not self.hash:
            self.set_hash(hashlib.sha256(Path(self.filename).read_bytes()).hexdigest())


class Network:
    """A LoRA that the prompt mentions."""

    def __init__(self, name: str, network_on_disk: NetworkOnDisk) -> None:
        self.name, self.network_on_disk = name, network_on_disk
        self.mentioned_name: str | None = None
        self.mtime: float | None = None
