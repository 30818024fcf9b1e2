"""What the binding has done since when: the raw material of a generation's report."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lib_precision_lora.host.report import FileReport
from lib_precision_lora.plain_text import sentence as plain_sentence

KEPT_PASSES = 512
"""A generation of more batches than that is reported by its last ones."""


@dataclass(slots=True)
class Pass:
    """From one setting of the prompt's LoRAs to the next: a batch, a hires pass, a refiner.

    text_encoders: whether LoRAs act on these as well; sources: the name under which the host's patchers
    know a file → its place in `files`; host_layers: the same names → layers that went the host's own way,
    by model.
    """

    number: int
    patcher: str
    compute: str
    text_encoders: bool = True
    files: list[FileReport] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    host_layers: dict[tuple[str, str], int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, file: FileReport, source: str | None = None) -> None:
        if source is not None:
            self.sources[source] = len(self.files)
        if file.problem is not None:
            file = dataclasses.replace(file, problem=plain_sentence(file.problem))
            self.problems.append(str(file.problem))
        self.files.append(file)

    def problem(self, source: str | None, sentence: str) -> None:
        """Something was left out: the file of this source, or all of them (None).

        The sentence names the file as the prompt does: where it lies is nobody's business.
        """
        if source in self.sources:
            sentence = sentence.replace(source, self.files[self.sources[source]].name)
        sentence = plain_sentence(sentence)
        if sentence not in self.problems:
            self.problems.append(sentence)
        places = range(len(self.files)) if source is None else [self.sources.get(source)]
        for place in places:
            if place is not None and self.files[place].problem is None:
                self.files[place] = dataclasses.replace(self.files[place], problem=sentence)

    def followed(self, model: str, seconds: float, host_layers: Mapping[str, int]) -> None:
        """A model of this class was brought to the prompt's LoRAs."""
        self.seconds += seconds
        for source, count in host_layers.items():
            self.host_layers[source, model] = count

    def reports(self) -> Iterable[FileReport]:
        for index, file in enumerate(self.files):
            sources = {source for source, place in self.sources.items() if place == index}
            count = sum(layers for (source, _), layers in self.host_layers.items() if source in sources)
            yield dataclasses.replace(file, host_layers=count)


class Record:
    """The last passes, numbered; what happens belongs to the last of them."""

    def __init__(self) -> None:
        self._passes: deque[Pass] = deque([Pass(0, "", "")], KEPT_PASSES)

    @property
    def present(self) -> Pass:
        return self._passes[-1]

    def begin(self, patcher: str, compute: str, text_encoders: bool = True) -> Pass:
        """The prompt's LoRAs are being set."""
        self._passes.append(Pass(self.present.number + 1, patcher, compute, text_encoders))
        return self.present

    def since(self, number: int) -> list[Pass]:
        """The passes after this number; where there are none, the one that is still in effect."""
        done = [done for done in self._passes if done.number > number]
        return done or [dataclasses.replace(self.present, seconds=0.0)]
