"""The table of docs/families.md: family × layer kind and stored weight, with the tests that show each cell.

    python -m tests.docs.families_table      writes the table into the page

The cells come from the ids of the tests that pytest collects: a cell names a test only if that test runs for
this family, on everything that the column stands for.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.storage.formats import VARIANTS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table of tests: begin -->\n", "<!-- table of tests: end -->\n"
COMMAND = "python -m tests.docs.families_table"
LAWS = "tests/branch/algebra/test_family_laws.py"
LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "embedding", "norm, bias")


class UntestedError(ValueError):
    """A cell that no test shows."""


def stored_group(variant: str) -> str:
    """The column of a stored variant."""
    kind = variant.partition("-")[0]
    if kind == "gguf":
        if "-baked-" in variant:
            return "GGUF baked"
        if "_K" in variant:
            return "GGUF K"
        return "GGUF float" if variant.split("-")[1] in ("F32", "F16", "BF16") else "GGUF Q"
    if kind == "fp8":
        return "FP8 scaled" if "scaled" in variant else "FP8"
    if kind == "comfy":
        name = variant.split("-")[1]
        return {"fp8": "FP8 scaled", "nvfp4": "NVFP4, MXFP8", "mxfp8": "NVFP4, MXFP8"}.get(name, "int8, int4")
    if variant.startswith("one-buffer-int8"):
        return "int8, int4"
    return {"dense": "dense", "bnb": "NF4, FP4", "one": "NF4, FP4"}[kind]


STORED: dict[str, list[str]] = {}
for _variant in VARIANTS:
    STORED.setdefault(stored_group(_variant), []).append(_variant)

COLUMNS = (*LAYERS, *STORED)


@dataclass(frozen=True)
class Evidence:
    """test: file::function; says: what it shows; cells: column → the ends of the ids that it needs there,
    each after the family's name; refused: the family is refused there, with a message."""

    test: str
    says: str
    cells: Mapping[str, Collection[str]]
    refused: bool = False

    def shows(self, family: str, column: str, collected: Collection[str]) -> bool:
        ends = self.cells.get(column, ())
        ids = [f"{self.test}[{'-'.join(filter(None, (family, end)))}]" for end in ends]
        return bool(ids) and all(each in collected for each in ids)


def wide(layer: str) -> list[str]:
    return [f"{layer}-torch.{dtype}-{bias}" for dtype in ("float16", "bfloat16") for bias in ("0.0", "1.0")]


EVIDENCE = (
    Evidence(
        f"{LAWS}::test_every_family_on_every_stored_weight_at_every_strength_is_the_float64_merge",
        "the effective delta on each variant, at strengths 1, 0.7, −0.5 and 2: 1e-6 in fp32, 1e-3 in fp16",
        STORED,
    ),
    Evidence(
        f"{LAWS}::test_a_forward_of_every_family_on_every_stored_weight_is_that_of_the_merged_weight",
        "a forward on each variant in fp32 and fp16 mode",
        STORED,
    ),
    Evidence(
        f"{LAWS}::test_every_family_on_a_convolution_is_the_float64_merge",
        "the effective delta of kernels, as 1",
        {"conv1d": ["5"], "conv2d": ["3x3", "1x1"], "conv3d": ["2x3x2"]},
    ),
    Evidence(
        f"{LAWS}::test_a_forward_multiplies_with_the_merged_weight",
        "forwards alone, at −0.5, and between two DoRAs",
        {
            "linear": ["linear"],
            "conv1d": ["conv_1d"],
            "conv2d": ["conv_2d"],
            "conv3d": ["conv_3d"],
            "embedding": ["embedding"],
        },
    ),
    Evidence(
        f"{LAWS}::test_a_wide_layer_errs_at_most_one_and_a_half_times_as_one_rounding",
        "forwards in fp16 and bf16, within 1.5 roundings of the output",
        {"linear": wide("wide_linear"), "conv2d": wide("wide_conv")},
    ),
    Evidence(f"{LAWS}::test_a_rotation_of_a_vocabulary_is_refused", "refused", {"embedding": [""]}, True),
    Evidence(
        f"{LAWS}::test_a_norm_and_a_bias_take_what_acts_on_outputs",
        "forwards of a norm and a bias",
        {"norm, bias": [""]},
    ),
    Evidence(
        f"{LAWS}::test_a_norm_and_a_bias_refuse_what_is_made_for_a_matrix",
        "refused",
        {"norm, bias": ["norm.scale", "layer.bias"]},
        True,
    ),
)


class Collector:
    """A pytest plugin that keeps the ids of what is collected."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def pytest_collection_modifyitems(self, items: Iterable[pytest.Item]) -> None:
        self.ids.update(item.nodeid for item in items)


def collected_ids() -> frozenset[str]:
    """The ids of all tests in the files that EVIDENCE names."""
    files = sorted({evidence.test.partition("::")[0] for evidence in EVIDENCE})
    collector, output = Collector(), io.StringIO()
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main([*arguments, *(str(ROOT / file) for file in files)], [collector])
    if code != 0:
        raise RuntimeError(f"pytest could not collect {', '.join(files)}:\n{output.getvalue()}")
    return frozenset(collector.ids)


def cell(family: str, column: str, collected: Collection[str]) -> str:
    """The numbers of the tests that show one cell. Raises `UntestedError` where there is none."""
    numbers = [
        f"no{number}" if evidence.refused else str(number)
        for number, evidence in enumerate(EVIDENCE, 1)
        if evidence.shows(family, column, collected)
    ]
    if not numbers:
        raise UntestedError(
            f"no test shows {family} on {column}: let one of {LAWS} run for it (or show that it is refused), "
            f"name it in EVIDENCE of tests/docs/families_table.py, then run {COMMAND}"
        )
    return " ".join(numbers).replace("no", "refused ")


def table(families: Iterable[str], collected: Collection[str]) -> str:
    """The table with its legend, in Markdown. Raises `UntestedError`."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    for family in families:
        cells = [cell(family, column, collected) for column in COLUMNS]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", "A stored weight's column stands for each of these:", ""]
    lines += [f"- {group}: {', '.join(variants)}" for group, variants in STORED.items()]
    lines += ["", "| | test | what it shows |", "|---|---|---|"]
    lines += [f"| {number} | `{each.test}` | {each.says} |" for number, each in enumerate(EVIDENCE, 1)]
    return "\n".join(lines) + "\n"


def with_table(page: str, made: str) -> str:
    """The page with this table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, table(FAMILIES, collected_ids())), encoding="utf-8")
    sys.stdout.write(f"{PAGE}: {len(FAMILIES)} families × {len(COLUMNS)} columns\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
