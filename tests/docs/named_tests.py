"""Tests that a page names, as `tests/file.py` or `tests/file.py::test_name`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def named_tests(page: str) -> set[tuple[str, str]]:
    """File and function, which is empty where a page names the file alone."""
    return set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", page))


def is_there(file: str, function: str) -> bool:
    path = ROOT / file
    if not path.is_file():
        return False
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return not function or function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
