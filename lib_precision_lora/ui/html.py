"""HTML of ours for the page, from the templates beside this file.

Every value of a template is made plain and escaped as it is put in; none is marked as safe.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib_precision_lora.plain_text import sentence

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """A template by the name of its file; a value that it names and is not given is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plain(value: Any) -> Any:
    """Markup is what a macro of the template has made."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else sentence(value)
