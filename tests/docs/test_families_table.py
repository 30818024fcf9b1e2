"""docs/families.md names every family, and every test that it names is there and runs."""

from __future__ import annotations

import re

import pytest

from tests.docs.families_table import (
    BEGIN,
    COLUMNS,
    COMMAND,
    END,
    EVIDENCE,
    PAGE,
    STORED,
    UntestedError,
    collected_ids,
    table,
)
from tests.docs.named_tests import is_there, named_tests
from tests.families import FAMILIES
from tests.storage.formats import VARIANTS

PAGE_TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def collected() -> frozenset[str]:
    return collected_ids()


def rows() -> dict[str, list[str]]:
    """The cells of the page's table of tests, by family."""
    block = PAGE_TEXT.partition(BEGIN)[2].partition(END)[0].partition("\n\n")[0]
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in block.splitlines()]
    return {first: rest for first, *rest in lines[2:]}


def test_every_family_has_a_row_with_a_test_in_every_cell() -> None:
    missing, gone = set(FAMILIES) - set(rows()), set(rows()) - set(FAMILIES)
    assert not missing | gone, f"docs/families.md lacks {missing}, still has {gone}: run {COMMAND}"
    for family, cells in rows().items():
        assert len(cells) == len(COLUMNS)
        for column, cell in zip(COLUMNS, cells, strict=True):
            assert re.fullmatch(r"\d+( \d+)*|refused \d+", cell), f"{family}, {column}: {cell!r}"


def test_every_cell_names_tests_that_run_for_that_family(collected: frozenset[str]) -> None:
    expected = table(FAMILIES, collected)
    present = PAGE_TEXT.partition(BEGIN)[2].partition(END)[0]
    assert present == expected, f"docs/families.md is not what the tests show: run {COMMAND}"


def test_every_test_that_the_page_names_exists() -> None:
    named = named_tests(PAGE_TEXT)
    assert len({function for _, function in named}) > len(EVIDENCE)
    for file, function in named:
        assert is_there(file, function), f"docs/families.md names {file}::{function}"


def test_every_stored_variant_has_a_column() -> None:
    assert sorted(variant for group in STORED.values() for variant in group) == sorted(VARIANTS)


def test_a_family_without_tests_is_named_with_what_to_do(collected: frozenset[str]) -> None:
    with pytest.raises(UntestedError, match=r"no test shows new-family on linear: .*families_table"):
        table([*FAMILIES, "new-family"], collected)


def test_one_variant_that_is_not_run_leaves_its_cell_empty(collected: frozenset[str]) -> None:
    fewer = {each for each in collected if "[lora-gguf-Q6_K]" not in each}
    assert len(fewer) == len(collected) - 2
    with pytest.raises(UntestedError, match="no test shows lora on GGUF K"):
        table(FAMILIES, fewer)
