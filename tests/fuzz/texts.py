"""Names and numbers that somebody may have written, and what no text of ours may hold."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.target import Fault
from tests.hostile_text import NAMES, acting

PLAIN_NAMES = ("cats", "dogs", "a cat, big", "512x512", "猫", 'the "best"', "a\\b", "c:d", "e=f", "", " ")
PARTS = (
    *("<b>", "&amp;", ",", ":", "=", '"', "\\", "'", "{", "}", "%s", "%(x)s", "{0}", "\\n", "..", "/", "../"),
    *(
        "\n",
        "\r",
        "\t",
        "\x00",
        "\x1b[31m",
        "\x9b",
        "\u202e",
        "\u2028",
        "\udc80",
        "\U0001f408",
        "e\u0301",
        "<lora:",
    ),
)
NUMBERS = (
    *("0", "1", "-1", "0.5", "1e39", "-1e39", "1e300", "-1e300", "1e999", "nan", "inf", "-inf", "NaN", "abc"),
    *(
        "",
        " ",
        "1,5",
        "0x10",
        "1_000",
        "1" * 400,
        "-0",
        "1e-400",
        "+1",
        " 0.5 ",
        "１",
        "٣",
        "1e",
        ".",
        "5.",
        "True",
    ),
    *("None", "1;2", "0.5.5", "3.4e38", "65504", "1e5", "-1e5"),
)


def name(random: Random) -> str:
    """One of those that harm, one that does not, or something put together of both."""
    kind = random.random()
    if kind < 0.3:
        return random.choice(NAMES)
    if kind < 0.5:
        return random.choice(PLAIN_NAMES)
    parts = (random.choice((*PARTS, *PLAIN_NAMES, *NUMBERS)) for _ in range(random.randint(1, 6)))
    return "".join(parts) * (random.choice((100, 5000)) if random.random() < 0.03 else 1)


def number(random: Random) -> str:
    if random.random() < 0.6:
        return random.choice(NUMBERS)
    return repr(random.uniform(-1, 1) * 10.0 ** random.randint(-320, 308))


def encodable(text: str) -> str:
    """As a file can have it: without halves of characters."""
    return text.encode("utf-8", "replace").decode("utf-8")


def check_said(said: str, folder: Path, lines: bool = False) -> None:
    """Raise `Fault` for a text with a path of this machine, or a character that acts.

    lines: whether it may have several.
    """
    bad = acting(said) | ({"\n"} & set(said) if not lines else set())
    if bad:
        raise Fault(f"what is said has {sorted(bad)!r}: {said[:300]!r}")
    if str(folder) in said:
        raise Fault(f"what is said has the path of a folder: {said[:300]!r}")
