"""Names and plans work without torch, and names ask no other part of the library."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lib_precision_lora

ROOT = Path(lib_precision_lora.__file__).parent
MEASURES = "memory.meter"
"""What was really taken is measured by torch."""

WITHOUT_TORCH = (
    *sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("names", "memory")
        for path in (ROOT / folder).glob("*.py")
        if path.stem != "__init__"
    ),
    "report.plan_report",
    "report.plan_text",
)
WATCH = """
import importlib, json, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors", "bitsandbytes"):
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch())
failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module("lib_precision_lora." + name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


def failing(modules: tuple[str, ...]) -> dict[str, str]:
    """Modules that cannot be imported where there is no torch, and what they ask for."""
    command = [sys.executable, "-c", WATCH, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_names_headers_and_plans_are_imported_without_torch() -> None:
    assert len(WITHOUT_TORCH) > 20
    assert failing(tuple(name for name in WITHOUT_TORCH if name != MEASURES)) == {}


def test_what_needs_torch_is_seen_to_need_it() -> None:
    assert failing((MEASURES, "adapters.reader")) == {MEASURES: "torch", "adapters.reader": "torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "names").glob("*.py")), ids=lambda path: path.name)
def test_names_ask_no_other_room(path: Path) -> None:
    asked = {
        name
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    ours = {name for name in asked if name.startswith("lib_precision_lora")}
    assert all(name.startswith("lib_precision_lora.names") for name in ours), ours
