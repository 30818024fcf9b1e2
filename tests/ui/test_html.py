"""HTML of ours: what is put into a template is text, and there is no other way to the page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from lib_precision_lora.ui.html import TEMPLATES, render
from lib_precision_lora.ui.settings import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
HTML_FROM_TEXT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|\$\{.*<"
)
TAG = re.compile(r"</?[a-z][a-z0-9]*[ />]", re.IGNORECASE)


def test_a_value_is_escaped_and_plain() -> None:
    assert render("scope.html", SCOPE="<b>&\x1b[1m\n") == r"<p>&lt;b&gt;&amp;\x1b[1m\n</p>"
    assert render("scope.html", SCOPE=7) == "<p>7</p>"


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("scope.html")


def test_no_template_takes_a_value_for_html() -> None:
    templates = sorted(TEMPLATES.glob("*"))
    assert len(templates) >= 2
    for template in templates:
        assert template.suffix == ".html"
        assert not re.search(r"\|\s*safe\b|autoescape|Markup", template.read_text()), template


def test_no_python_writes_html_by_hand() -> None:
    """Neither in an f-string nor by adding, formatting or joining strings: no string has a tag in it."""
    files = sorted((ROOT / "lib_precision_lora").rglob("*.py")) + sorted((ROOT / "scripts").glob("*.py"))
    assert len(files) > 100
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }
        found = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ]
        assert [text for text in found if TAG.search(text)] == [], file


def test_no_script_of_the_page_makes_html_of_text() -> None:
    scripts = sorted((ROOT / "javascript").glob("*.js"))
    assert len(scripts) >= 2
    for script in scripts:
        assert not HTML_FROM_TEXT.search(script.read_text(encoding="utf-8")), script


def test_settings_have_no_html_in_their_texts() -> None:
    """The WebUI puts an explanation into its page as HTML."""
    assert OPTIONS
    for option in OPTIONS:
        assert not set("<>&") & set(f"{option.label}{option.info}"), option.key
