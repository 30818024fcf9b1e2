"""What the binding has done since when: the raw material of a generation's report.

One thread writes, while others read: what holds several things is exchanged whole, and never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.generation.sums import Followed, PromptEntry, sums
from lib_precision_lora.host.loras.division import Place
from lib_precision_lora.plain_text import sentence as plain_sentence
from lib_precision_lora.ui.choices import OURS

KEPT_PASSES = 512
"""A generation of more batches than that is reported by its last ones."""


@dataclass(slots=True)
class Pass:
    """From one setting of the prompt's LoRAs to the next: a batch, a hires pass, a refiner.

    text_encoders: whether LoRAs act on these as well; once: whether equal entries are applied once; entries:
    the prompt's, in its order; models: what each of the checkpoint's models was brought to, by its class;
    seconds: spent on that.
    """

    number: int
    patcher: str
    compute: str
    text_encoders: bool = True
    once: bool = False
    entries: tuple[PromptEntry, ...] = ()
    models: Mapping[str, Followed] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seconds: float = 0.0

    def add(self, file: FileReport, source: str | None = None, path: str | None = None) -> None:
        """source: the name under which the host's patchers know this entry; path: the file's, where there
        is one."""
        if file.problem is not None:
            file = dataclasses.replace(file, problem=plain_sentence(file.problem))
            self.problems = (*self.problems, str(file.problem))
        self.entries = (*self.entries, PromptEntry(file, source, path or file.name))

    def problem(self, source: str | None, sentence: str) -> None:
        """Something was left out: the entry of this source, or all of them (None).

        The sentence names the file as the prompt does: where it lies is nobody's business.
        """
        for entry in self.entries:
            if source is not None and entry.source == source:
                sentence = sentence.replace(source, entry.file.name)
        sentence = plain_sentence(sentence)
        if sentence not in self.problems:
            self.problems = (*self.problems, sentence)
        self.entries = tuple(
            entry.without(sentence) if source is None or entry.source == source else entry
            for entry in self.entries
        )

    def followed(
        self,
        model: str,
        text_encoder: bool,
        seconds: float,
        host_layers: Mapping[str, int],
        strengths: Mapping[str, Mapping[Place, float]],
    ) -> None:
        """A model of this class was brought to the prompt's LoRAs.

        host_layers: source → layers that went the host's own way; strengths: source → the strength of each of
        its patches, as they are attached.
        """
        self.seconds += seconds
        self.models = {**self.models, model: Followed(text_encoder, host_layers, strengths)}

    def reports(self) -> Iterable[FileReport]:
        """One for each file, with the sum of its strengths, and one for each reason to leave it out."""
        return sums(self.entries, tuple(self.models.values()), self.once)

    @property
    def applied_by_us(self) -> bool:
        """Whether any layer is changed by us: by the prompt's LoRAs, or by another extension's patches."""
        applied = (file for file in self.reports() if file.problem is None)
        prompted = any(file.unet_layers + file.text_layers > file.host_layers for file in applied)
        return self.patcher == OURS and (prompted or any(model.ours for model in self.models.values()))


class Record:
    """The last passes, numbered; what happens belongs to the last of them."""

    def __init__(self) -> None:
        self._passes = (Pass(0, "", ""),)

    @property
    def present(self) -> Pass:
        return self._passes[-1]

    def begin(self, patcher: str, compute: str, text_encoders: bool = True, once: bool = False) -> Pass:
        """The prompt's LoRAs are being set. once: whether equal entries are applied once."""
        begun = Pass(self.present.number + 1, patcher, compute, text_encoders, once)
        self._passes = (*self._passes[1 - KEPT_PASSES :], begun)
        return begun

    def since(self, number: int) -> list[Pass]:
        """The passes after this number; where there are none, the one that is still in effect."""
        passes = self._passes
        done = [done for done in passes if done.number > number]
        return done or [dataclasses.replace(passes[-1], seconds=0.0)]
