"""docs/performance.md: every test that it names is there, and both READMEs send readers to it."""

from __future__ import annotations

import pytest

from tests.docs.named_tests import ROOT, is_there, named_tests

PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "function"), sorted(named_tests(PAGE)))
def test_a_test_that_the_page_names_exists(file: str, function: str) -> None:
    assert is_there(file, function)


def test_readers_are_sent_there() -> None:
    for name in ("README.md", "README.zh.md"):
        assert "(docs/performance.md)" in (ROOT / name).read_text(encoding="utf-8")
