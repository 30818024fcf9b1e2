"""Amounts of memory and sizes of images as people type them."""

from __future__ import annotations

import re
from collections.abc import Mapping

UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
LARGEST_BYTES = 2**50
LARGEST_SIDE = 65536

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.ASCII | re.IGNORECASE)
_SIZE = re.compile(r"(\d{1,9})[x×](\d{1,9})", re.ASCII | re.IGNORECASE)


class AmountError(ValueError):
    """What was typed is no amount; one sentence with the option's name."""


def parse_bytes(text: str, option: str, least: int = 0) -> int:
    """`12GiB` (2^30), `12GB` (10^9), `12288MiB`, `0.5GiB` or plain bytes, in bytes. Raises `AmountError`."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise AmountError(
            f"{option} {text}: give an amount of memory such as 12GiB, 12GB, 12288MiB or bytes."
        )
    amount = int(float(match[1]) * UNITS[match[2].lower()]) if len(match[1]) < 20 else LARGEST_BYTES + 1
    if not least <= amount <= LARGEST_BYTES:
        raise AmountError(f"{option} {text}: the amount must be from {least} to {LARGEST_BYTES} bytes.")
    return amount


def parse_size(text: str, option: str) -> tuple[int, int]:
    """`1024x768` as width and height in pixels. Raises `AmountError`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise AmountError(f"{option} {text}: give width and height in pixels, such as 1024x1024.")
    width, height = int(match[1]), int(match[2])
    if not (8 <= width <= LARGEST_SIDE and 8 <= height <= LARGEST_SIDE):
        raise AmountError(f"{option} {text}: each side must be from 8 to {LARGEST_SIDE} pixels.")
    return width, height
