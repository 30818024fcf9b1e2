"""Names that somebody chose to do harm, and a check that a text harms nobody."""

from __future__ import annotations

import unicodedata

LINE = "cats\n[Precision LoRA] 99 of 99 LoRAs applied"
ANSI = "cats\x1b[2J\x1b[1;31m\x1b]0;owned\x07"
ANSI_OF_EIGHT_BITS = "cats\x9b31m"
TURNED = "cats\u202estxet\u2066"
HALF = "cats\udc80"
HTML = "<img src=x onerror=alert(1) "
NAMES = (
    LINE,
    "cats\r\rdogs",
    ANSI,
    ANSI_OF_EIGHT_BITS,
    TURNED,
    HALF,
    "cats\x00\x08\x7f",
    "cats\u2028dogs",
    HTML,
)
"""Whoever shows one of them shows all of it."""


def acting(text: str) -> set[str]:
    """The characters of a text that a console would act on, but for the ends of its lines."""
    bad = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    return {char for char in text if char != "\n" and unicodedata.category(char) in bad}
