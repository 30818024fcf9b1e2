r"""PEFT's patterns: names of layers, or regular expressions, each with a value.

    the first key with `(.*\.)?(key)$` from the beginning of the layer's path gives its value

A file is not trusted with a regular expression: of those only what runs in bounded time is used.
Source: PEFT, `get_pattern_key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NAME = re.compile(r"(\^?)((?:[\w-]|\\?\.)+)\$?")
_UNBOUNDED = re.compile(r"[*+]")
_UNSAFE = re.compile(r"[{}]|\)[*+?]|\(\?|\\\d|[*+][*+?]")
LONGEST_PATTERN, LONGEST_PATH, MOST_PATTERNS, MOST_REPEATS = 200, 128, 16, 2
LONGEST_NAME = 512
"""A match takes at most `LONGEST_PATH ** (MOST_REPEATS + 1)` steps."""


class Patterns:
    """Values by pattern. field: of the configuration, for messages; findings: of what cannot be used."""

    def __init__(self, field: str, values: Any) -> None:
        dotted, flat = _Form("."), _Form("_")
        refused: list[str] = []
        for order, (pattern, value) in enumerate(values.items() if isinstance(values, dict) else ()):
            if not all(form.take(order, pattern, value) for form in (dotted, flat)):
                refused.append(pattern)
        self._forms = {False: dotted, True: flat}
        self.findings: list[str] = []
        if refused:
            self.findings.append(
                f"the header's {field} has {len(refused)} expressions that are not understood (the first: "
                f"{refused[0][:60]}): layers that they mean have another scale than they were trained with"
            )

    def value(self, path: str, flat: bool, otherwise: Any) -> Any:
        """The value of the first pattern that means this layer. flat: the path has underscores for dots."""
        form = self._forms[flat]
        found = list(form.found(path)) if form.any and len(path) <= LONGEST_NAME else ()
        return min(found, key=lambda entry: entry[0])[1] if found else otherwise


class _Form:
    """Patterns for paths with this mark between their parts."""

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._names: dict[str, tuple[int, Any]] = {}
        self._anchored: dict[str, tuple[int, Any]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], Any]] = []

    @property
    def any(self) -> bool:
        return bool(self._names or self._anchored or self._expressions)

    def take(self, order: int, pattern: str, value: Any) -> bool:
        """False for a pattern that cannot be used."""
        name = _NAME.fullmatch(pattern)
        if name is not None:
            plain = name[2].replace("\\.", ".").replace(".", self._mark)
            (self._anchored if name[1] else self._names).setdefault(plain, (order, value))
            return True
        expression = _expression(pattern, self._mark) if len(self._expressions) < MOST_PATTERNS else None
        if expression is not None:
            self._expressions.append((order, expression, value))
        return expression is not None

    def found(self, path: str) -> Iterator[tuple[int, Any]]:
        if path in self._anchored:
            yield self._anchored[path]
        end = path
        while end:
            if end in self._names:
                yield self._names[end]
            end = end.partition(self._mark)[2]
        if len(path) <= LONGEST_PATH:
            for order, expression, value in self._expressions:
                if expression.fullmatch(path):
                    yield order, value


def _expression(pattern: str, mark: str) -> re.Pattern[str] | None:
    """The pattern compiled; None for one that is too long, too slow, or none."""
    if len(pattern) > LONGEST_PATTERN or _UNSAFE.search(pattern):
        return None
    if len(_UNBOUNDED.findall(pattern)) > MOST_REPEATS:
        return None
    try:
        return re.compile(rf"(?:.*{re.escape(mark)})?(?:{pattern.replace(chr(92) + '.', re.escape(mark))})")
    except (re.error, OverflowError, RecursionError):
        return None
