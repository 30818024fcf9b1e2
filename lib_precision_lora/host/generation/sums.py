"""What a prompt's entries come to: the same file several times is one, with the sum of its strengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.loras.division import Place


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """One LoRA of the prompt. source: how the host's patchers know it, None where they do not; path: which
    file it is of."""

    file: FileReport
    source: str | None
    path: str

    def without(self, problem: str) -> PromptEntry:
        """Left out, for this reason unless there is one already."""
        if self.file.problem is not None:
            return self
        return dataclasses.replace(self, file=dataclasses.replace(self.file, problem=problem))


@dataclass(frozen=True, slots=True)
class Followed:
    """What a model was brought to. host_layers: source → layers that went the host's own way; strengths:
    source → the strength of each of its patches, as they are attached."""

    text_encoder: bool
    host_layers: Mapping[str, int]
    strengths: Mapping[str, Mapping[Place, float]]

    @property
    def ours(self) -> bool:
        """Whether anything runs beside the model."""
        return any(
            sum(map(bool, places.values())) > self.host_layers.get(source, 0)
            for source, places in self.strengths.items()
        )


def sums(entries: Sequence[PromptEntry], models: Sequence[Followed], once: bool) -> Iterable[FileReport]:
    """A report for each file, in the prompt's order; what is left out of one is by itself.

    once: who applies them knows an entry by its file and strength, and applies equal ones once.
    """
    groups: dict[tuple[str, str | None], list[PromptEntry]] = {}
    for entry in entries:
        groups.setdefault((entry.path, entry.file.problem), []).append(entry)
    for (_, problem), group in groups.items():
        files = [entry.file for entry in group]
        unet, text = [file.strength for file in files], [file.text_strength for file in files]
        whole = dataclasses.replace(
            files[0],
            strength=fsum(dict.fromkeys(unet) if once else unet),
            text_strength=fsum(dict.fromkeys(text) if once else text),
            unet_layers=max(file.unet_layers for file in files),
            text_layers=max(file.text_layers for file in files),
        )
        yield whole if problem is not None else _as_attached(whole, group, models)


def _as_attached(file: FileReport, group: Sequence[PromptEntry], models: Sequence[Followed]) -> FileReport:
    """With the layers and strengths that were found attached, where a model was followed: another extension
    may have changed what was asked for."""
    sources = [entry.source for entry in group if entry.source is not None]
    host_layers = sum(max((each.host_layers.get(name, 0) for name in sources), default=0) for each in models)
    file = dataclasses.replace(file, host_layers=host_layers)
    unet = [_by_place(each, sources) for each in models if not each.text_encoder]
    if unet:
        layers, strengths = _told(unet, file.strength)
        file = dataclasses.replace(file, unet_layers=layers, unet_strengths=strengths)
    text = [_by_place(each, sources) for each in models if each.text_encoder]
    if text:
        layers, strengths = _told(text, file.text_strength)
        file = dataclasses.replace(file, text_layers=layers, text_strengths=strengths)
    return file


def _by_place(model: Followed, sources: Sequence[str]) -> list[float]:
    """The sum of these sources' strengths at each place that one of them changes."""
    there: dict[Place, list[float]] = {}
    for source in sources:
        for place, strength in model.strengths.get(source, {}).items():
            if strength:
                there.setdefault(place, []).append(strength)
    return [fsum(strengths) for strengths in there.values()]


def _told(models: Sequence[Sequence[float]], asked: float) -> tuple[int, tuple[float, ...]]:
    """How many layers, and their strengths where these are not the one that was asked for."""
    found = [strength for strengths in models for strength in strengths]
    distinct = tuple(sorted(set(found)))
    return len(found), () if distinct in ((), (asked,)) else distinct
