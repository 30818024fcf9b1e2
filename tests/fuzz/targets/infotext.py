"""Infotexts that somebody pastes: our fields parsed back, names read back, pop-ups that are text."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

from lib_precision_lora.host.generation import infotext, override
from lib_precision_lora.host.generation.infotext import OURS_IN_INFOTEXT, read_parameters
from lib_precision_lora.host.generation.name_list import joined, separated
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED, Notices
from lib_precision_lora.host.page.arguments import problems
from lib_precision_lora.ui.choices import COMPUTE_CHOICES, PATCHERS
from tests.fuzz.host import log, patched, webui
from tests.fuzz.mutate import mutated
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.texts import check_said, name, number

FIELDS = (
    *OURS_IN_INFOTEXT,
    "Precision LoRA x",
    "Precision LoRA ",
    "Precision LoRA skipped-1",
    "Steps",
    "Seed",
)
PARSED = 2000
"""Characters; the WebUI's own expression takes time by their square."""

KNOWN = ("fp16", "fp32", "Automatic", "as set above", "bnb-nf4", *PATCHERS, *COMPUTE_CHOICES)
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A field of an infotext, as WebUIs read it: a name, and a JSON string or whatever has no comma."""


def make(random: Random) -> Input:
    values = {_field(random): _value(random) for _ in range(random.choice((0, 1, 2, 3, 6, 30)))}
    line = ", ".join(f"{field}: {_quoted(random, value)}" for field, value in values.items())
    if random.random() < 0.5:
        line = mutated(random, line.encode("utf-8", "replace")).decode("utf-8", "replace")[:20_000]
    names = [name(random)[:600] for _ in range(random.choice((0, 1, 2, 5)))]
    return Input(rest=(values, line, names))


def _field(random: Random) -> str:
    return (
        random.choice(FIELDS)
        if random.random() < 0.8
        else random.choice(("Precision LoRA ", "")) + name(random)
    )


def _value(random: Random) -> str:
    return random.choice((random.choice(KNOWN), name(random), number(random), joined([name(random), "cats"])))


def _quoted(random: Random, value: str) -> str:
    """As WebUIs write it, and now and then not."""
    if random.random() < 0.1 or not set(value) & set(",\n:"):
        return value
    return json.dumps(value, ensure_ascii=False)


def parsed(line: str) -> dict[str, str]:
    """As WebUIs do."""
    found = {}
    for field, value in PARAMETER.findall(line):
        if value.startswith('"') and value.endswith('"'):
            try:
                value = json.loads(value)
            except ValueError:
                value = value[1:-1]
        found[field] = value
    return found


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    shown: list[str] = []
    gradio = ModuleType("gradio")
    gradio.Warning = gradio.Info = shown.append  # type: ignore[attr-defined]
    gradio.Radio = gradio.Slider = SimpleNamespace  # type: ignore[attr-defined]
    with patched() as patch, webui(folder):
        patch.setitem(sys.modules, "gradio", gradio)
        choices = override.low_bits_choices()

        def check(given: Input) -> bool:
            values, line, names = given.rest
            if separated(joined(names)) != names:
                raise Fault(f"names are not read back: {names!r}")
            _check_left_out(names, folder)
            separated(line)
            accepted = True
            for read in (values, parsed(line[:PARSED])):
                accepted &= _check_pasted(read, choices, folder, line, shown)
            return accepted

        yield check


def _check_pasted(
    values: Mapping[str, str], choices: list[str], folder: Path, line: str, shown: list[str]
) -> bool:
    """What is chosen is there to be chosen, and what is said of the rest is text."""
    read = read_parameters(values, choices)
    wrong = problems([read.enabled, read.low_bits, read.compute, read.patcher], choices)
    if wrong:
        raise Fault(f"what is pasted is no choice: {wrong}")
    shown.clear()
    with log() as console:
        infotext.warn_of_what_is_not_pasted(line, values)
    check_said(console.getvalue(), folder, lines=True)
    for message in shown:
        check_said(message, folder)
        if "<" in message or html.unescape(message).count("\n"):
            raise Fault(f"a pop-up has an element: {message[:300]!r}")
    if len(shown) > infotext.MOST_POP_UPS + 1 or bool(shown) != bool(read.problems):
        raise Fault(f"{len(shown)} pop-ups of {len(read.problems)} problems")
    return not read.problems


def _check_left_out(names: list[str], folder: Path) -> None:
    """Names of files that were left out, through an infotext and back."""
    notices, parameters = Notices(), dict[str, str]()
    with log():
        for each in names:
            notices.problem(each, f"LoRA {each} was left out")
        notices.show(lambda comment: check_said(comment, folder), parameters)
    line = parameters.get(INFOTEXT_SKIPPED, "")
    check_said(line, folder)
    pasted = parsed(f"{INFOTEXT_SKIPPED}: {_written(line)}, Steps: 20") if line else {}
    if separated(pasted.get(INFOTEXT_SKIPPED, "")) != separated(line):
        raise Fault(f"the names are read back as {pasted!r}, and were {line!r}")


def _written(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",\n:") else value


TARGET = Target("infotext", make, opened)
