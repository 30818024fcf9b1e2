"""What a LoRA file holds, layer by layer, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_precision_lora.adapters import AdapterError, AdapterFile, adapter_bytes, read_adapters
from lib_precision_lora.adapters.adapter import widened
from lib_precision_lora.containers import ContainerError, LoraContent, read_lora
from lib_precision_lora.names.architectures import unreadable


class UnreadableFileError(ValueError):
    """A file that cannot be read as a LoRA; one sentence, with what to do."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapter. alpha: as the file or its header gives it, None where none scales it; nbytes: of its
    factors."""

    name: str
    kind: str
    rank: int | None
    alpha: float | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """layout: who writes files so ("kohya", "PEFT", …); unmatched: keys that are not understood, which
    are a finding where they belong to a layer that is; findings: why the file, or a part of it, cannot be
    applied, and where its header disagrees."""

    path: str
    nbytes: int
    layout: str
    layers: tuple[Layer, ...]
    unmatched: tuple[str, ...]
    findings: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """Kind → number of layers."""
        return dict(Counter(layer.kind for layer in self.layers))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank → number of layers, by rank."""
        return dict(sorted(Counter(layer.rank for layer in self.layers if layer.rank is not None).items()))

    @property
    def alphas(self) -> dict[float, int]:
        """Alpha → number of layers, by alpha."""
        return dict(sorted(Counter(layer.alpha for layer in self.layers if layer.alpha is not None).items()))

    def as_object(self) -> dict[str, Any]:
        """For JSON: the fields and the counts."""
        return {**asdict(self), "kinds": self.kinds, "ranks": self.ranks, "alphas": self.alphas}


def inspect_file(path: Path, pickles: bool = True) -> Inspection:
    """pickles: False where a file of `torch.save` is refused unread. Raises UnreadableFileError for a missing
    or damaged file, and for one that holds more than weights."""
    tensors = read_lora_file(path, pickles)
    try:
        adapters = read_adapters(tensors, metadata=tensors.metadata)
        refusal = None
    except AdapterError as error:
        adapters, refusal = AdapterFile({}, (), "unknown"), str(error)
    return Inspection(
        path=str(path),
        nbytes=path.stat().st_size,
        layout=adapters.layout,
        layers=tuple(layers(adapters)),
        unmatched=adapters.unmatched,
        findings=tuple(findings(tensors, adapters, refusal)),
    )


def read_lora_file(path: Path, pickles: bool = True) -> LoraContent:
    """What the file holds, on the CPU. Raises UnreadableFileError."""
    try:
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "special file"
            raise UnreadableFileError(
                f"{path}: it is a {kind}, and no file that can be read; check the path."
            )
        return read_lora(path, pickles=pickles)
    except FileNotFoundError as error:
        raise UnreadableFileError(f"{path}: there is no such file; check the path.") from error
    except ContainerError as error:
        raise UnreadableFileError(f"{path}: {error}.") from error
    except OSError as error:
        raise UnreadableFileError(
            f"{path}: the file cannot be read: {error.strerror or error}; check the path."
        ) from error


def layers(adapters: AdapterFile) -> Iterator[Layer]:
    for name, adapter in adapters.items():
        yield Layer(
            name=str(name),
            kind=adapter.kind,
            rank=adapter.rank,
            alpha=adapters.alphas.get(name),
            nbytes=adapter_bytes(adapter),
        )


def findings(tensors: Mapping[str, Tensor], adapters: AdapterFile, refusal: str | None) -> Iterator[str]:
    """One sentence each: tensors without values, with NaN or inf, what the reader found and refused, no
    layer. A whole LoKr's alpha, which scales nothing, may be inf."""
    for key, values in tensors.items():
        if values.numel() == 0:
            yield f"{key}: shape {list(values.shape)} holds no values (rank zero)"
        elif values.is_floating_point() and not (key.endswith(".alpha") and adapters):
            count = _not_finite(key, values)
            if count:
                yield f"{key}: {count} of {values.numel()} values are NaN or inf"
    yield from adapters.findings
    if refusal is not None:
        yield f"the file cannot be applied: {refusal}"
    elif not adapters:
        unknown = f"none of its {len(tensors)} keys is understood; is it a checkpoint, or a new kind?"
        yield unreadable(tensors) or unknown


def _not_finite(key: str, values: Tensor) -> int:
    """How many values are NaN or inf; none in a type that cannot be read, which the reader refuses."""
    try:
        return int((~torch.isfinite(widened(key, "", values))).sum())
    except AdapterError:
        return 0
