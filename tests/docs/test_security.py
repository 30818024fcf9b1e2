"""docs/security.md names a test for each promise, and every one of them exists."""

from __future__ import annotations

import pytest

from tests.docs.named_tests import ROOT, is_there, named_tests

PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
SENDERS = ("file in the LoRA folder", "prompt", "pasted infotext", "client of the API", "visitor of the page")


@pytest.mark.parametrize(("file", "function"), sorted(named_tests(PAGE)))
def test_a_test_that_the_page_names_exists(file: str, function: str) -> None:
    assert is_there(file, function)


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 15
    for row in rows:
        promise, _, shown = row.removesuffix("|").rpartition(" | ")
        assert promise
        assert named_tests(shown), f"no test shows: {promise}"


def test_the_page_speaks_of_everybody_who_sends_something() -> None:
    headings = [line for line in PAGE.splitlines() if line.startswith("## ")]
    for sender in (*SENDERS, "Not promised"):
        assert any(sender in heading for heading in headings), sender


def test_readers_are_sent_there() -> None:
    for name in ("README.md", "README.zh.md"):
        assert "(docs/security.md)" in (ROOT / name).read_text(encoding="utf-8")


def test_a_test_that_is_not_there_is_seen() -> None:
    assert not is_there("tests/docs/test_security.py", "test_nothing")
    assert not is_there("tests/docs/nowhere.py", "")
    assert named_tests("`tests/a.py::test_b`, `tests/c.py`") == {("tests/a.py", "test_b"), ("tests/c.py", "")}
