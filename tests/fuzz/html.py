"""HTML of ours: closed elements of known names, whatever texts stand in it."""

from __future__ import annotations

from html.parser import HTMLParser

from tests.fuzz.target import Fault

ELEMENTS = frozenset(
    {"b", "dd", "details", "div", "dl", "dt", "h4", "i", "li", "p", "section", "span", "summary", "ul"}
)
"""Those of our templates."""


class _Reader(HTMLParser):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            raise Fault(f"the page has an element {tag!r}")
        for name, _ in attrs:
            if name.startswith("on") or name in ("src", "href", "srcdoc"):
                raise Fault(f"an element of the page has {name!r}")


def check_page(html: str) -> None:
    """Raise `Fault` for an element that is none of ours."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
