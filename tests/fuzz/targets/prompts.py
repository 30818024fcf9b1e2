"""Prompts with `<lora:…>`: an image each, finite, and a word about each LoRA that is not in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from lib_precision_lora.host.generation.name_list import separated
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.ui.applied import applied_html
from tests.fuzz.host import FILES, log, webui
from tests.fuzz.html import check_page
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.texts import check_said, name, number
from tests.host.checkpoints import Checkpoint
from tests.host.images import generate, load_checkpoint
from tests.host.observers import bases_of
from tests.host.reports import reported

PREFIX = "[Precision LoRA] "
TEXTS = (
    "a cat",
    "",
    "a <b>cat</b>",
    "a cat, <hypernet:x:1>",
    "(a cat:1.2)",
    "<lora:>",
    "<lora",
    "<>",
    "a\x00\n",
)
TAME = 1e4
"""Strengths up to it give numbers within fp32."""

LEFT_OUT = ("half", "torn", "nan", "code")


def make(random: Random) -> Input:
    parts = [random.choice(TEXTS)]
    for _ in range(random.choice((0, 1, 1, 2, 3, 10))):
        lora = random.choice(FILES) if random.random() < 0.6 else name(random)[:3000]
        behind = [_strength(random) for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5)))]
        parts.append(f"<lora:{':'.join((lora, *behind))}>")
    if random.random() < 0.2:
        random.shuffle(parts)
    return Input(rest="".join(parts))


def _strength(random: Random) -> str:
    value = number(random)
    kind = random.random()
    if kind < 0.5:
        return random.choice(("1", "0.8", "-0.5", "0", value))
    return random.choice(("te=", "unet=", "dyn=", "te", "=", "", "te=1=", name(random)[:100])) + value


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    with webui(folder) as host:
        checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
        bases, plain = bases_of(checkpoint), generate(host, "a cat").values

        def check(given: Input) -> bool:
            with log() as console:
                report, image = reported(host, given.rest)
            tame = all(max(abs(file.strength), abs(file.text_strength)) <= TAME for file in report.applied)
            if tame and not torch.isfinite(image.values).all():
                raise Fault("the image is not finite")
            said = [
                *image.comments,
                *map(str, image.parameters.values()),
                *image.parameters,
                *report.problems,
            ]
            for text in (*said, *(file.problem or "" for file in report.files)):
                check_said(text, folder)
            _check_log(console.getvalue(), folder)
            check_page(applied_html(report))
            json.dumps(report.to_json(), allow_nan=False)
            skipped = separated(str(image.parameters.get(INFOTEXT_SKIPPED, "")))
            left_out = {file.name for file in report.files if file.problem is not None}
            for each in LEFT_OUT:
                if f"<lora:{each}>" in given.rest and each not in skipped:
                    raise Fault(f"{each} is not said to be left out: {skipped}")
            if bool(left_out) != bool(skipped):
                raise Fault(f"the report leaves out {sorted(left_out)}, the infotext {skipped}")
            if bases_of(checkpoint) != bases:
                raise Fault("the checkpoint is not what it was")
            if not report.applied and not torch.equal(generate(host, "a cat").values, plain):
                raise Fault("something of a LoRA is left")
            return not report.problems and not left_out

        yield check


def _check_log(shown: str, folder: Path) -> None:
    """Lines of the log are ours, each of them, and act on nothing. A traceback of ours may name files of
    ours."""
    check_said(shown.replace(str(folder), ""), folder, lines=True)
    for line in filter(None, shown.split("\n")):
        if not line.startswith((PREFIX, "    ")):
            raise Fault(f"a line of the log is forged: {line[:300]!r}")


TARGET = Target("prompts", make, opened)
