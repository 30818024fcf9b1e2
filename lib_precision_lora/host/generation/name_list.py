"""Names in one line of an image's parameters, so that they can be read back.

A name stands as it is, or as a JSON string where it could be mistaken for something else:

    cats, "cats, dogs and \\"others\\"", dogs

A WebUI puts a value with one of `,:` or a line's end in quotes, and takes them off again where it reads the
image's parameters. It takes off those of any other value, too, so that one quoted name alone gets a comma.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_NAME = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]*)\s*(?:,|$)')
_QUOTED_BY_WEBUIS = re.compile(r"[,:\n]")
_NEEDS_QUOTES = re.compile(r'[,"\x00-\x1f\x7f\u0085\u2028\u2029]|^\s|\s$|^$')


def joined(names: Iterable[str]) -> str:
    """One line that `separated` takes apart again, also after a WebUI has written and read it."""
    line = ", ".join(
        json.dumps(name, ensure_ascii=False) if _NEEDS_QUOTES.search(name) else name for name in names
    )
    return f"{line}," if line.startswith('"') and not _QUOTED_BY_WEBUIS.search(line) else line


def separated(line: str) -> list[str]:
    """The names of such a line; what is quoted wrongly is a name as it stands."""
    return [_unquoted(name) for name in _NAME.findall(line) if name]


def _unquoted(name: str) -> str:
    if not name.startswith('"'):
        return name.rstrip()
    try:
        return str(json.loads(name))
    except ValueError:
        return name
