"""What a LoRA file holds, and why one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

SAID_DIGEST = "sshs_model_hash"
"""Under this key a header says the digest of the weights."""


class ContainerError(ValueError):
    """A file that cannot be read: a sentence without the file's name, which says what to do."""


class PickleError(ContainerError):
    """A file that is a pickle where none is read, or holds more than weights."""


@dataclass(frozen=True, slots=True, eq=False)
class LoraContent(Mapping[str, Tensor]):
    """The tensors of a file by key, with what else the file says.

    tensors: the same, on the CPU, each with memory of its own unless the file shares it; metadata: that of a
    safetensors header, empty for other files; digest: SHA-256 of the whole file, in hexadecimal digits;
    weights_digest: the same of a safetensors file without its header (AutoV3, as model sites name it), if the
    header says one; of torch files the digest.

    The digests are those of the very bytes that the tensors come from.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    weights_digest: str = ""

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def listed_digest(self) -> str:
        """The one that a WebUI shows: what the header says where that is true, else the
        digest."""
        said = self.metadata.get(SAID_DIGEST)
        return self.weights_digest if said == self.weights_digest else self.digest

    @property
    def held_bytes(self) -> int:
        """RAM that lives as long as the tensors: whole storages, each once, however little of it is seen."""
        storages = {
            storage.data_ptr(): storage.nbytes()
            for storage in (tensor.untyped_storage() for tensor in self.tensors.values())
        }
        return sum(storages.values())
