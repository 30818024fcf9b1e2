"""A plan as text: what is in the files, where the card's memory goes, whether it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from lib_precision_lora.plain_text import plain, plain_lines
from lib_precision_lora.report.plan_report import LoraRow, PlanReport
from lib_precision_lora.report.quantities import mebibytes

BAR_WIDTH = 64
BLOCKS = "█▓▒░╌"
LETTERS = "MLWGm"
EMPTY, END = "·", "│"


def shows_blocks(encoding: str | None) -> bool:
    """Whether a console of this encoding can show block characters."""
    try:
        (BLOCKS + EMPTY + END).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def plan_text(report: PlanReport, unicode: bool = True) -> str:
    """unicode: whether the console shows block characters; letters stand for them otherwise."""
    wish, budget = report.wish, report.budget
    images = f"{report.request.images} images per step" if report.request.images != 1 else "1 image per step"
    blocks = BLOCKS if unicode else LETTERS
    free = f"{mebibytes(budget.free_bytes)} of {mebibytes(budget.total_bytes)} free"
    assumed = "" if wish.free_bytes is not None else ", the rest taken to be the driver's and the desktop's"
    return plain_lines(
        [
            f"{wish.model}",
            f"{report.architecture.name}, {report.layout}; {wish.width}×{wish.height}, batch {wish.batch} "
            f"({images}); storage {wish.storage}",
            "",
            *_table(
                [
                    ("component", "stored as", "parameters", "in the file", "on the card"),
                    *(
                        (
                            row.name,
                            row.stored,
                            f"{row.parameters / 1e6:.1f} M",
                            mebibytes(row.file_bytes),
                            "moved off" if row.held_bytes is None else mebibytes(row.held_bytes),
                        )
                        for row in report.components
                    ),
                ]
            ),
            "",
            *_lora_lines(report),
            f"card  {free}{assumed}",
            _bar(_segments(report, blocks), budget.total_bytes, unicode),
            *(
                f"  {mark}  {name:<21} {mebibytes(size):>12}{f'  ({comment})' if comment else ''}"
                for mark, name, size, comment in (
                    (*segment, _comment(report, segment[1])) for segment in _segments(report, blocks)
                )
            ),
            "",
            report.verdict,
            *(f"  - {sentence}" for sentence in report.plan.advice),
            *(f"NOTE  {note}" for note in report.notes),
        ]
    )


def _lora_lines(report: PlanReport) -> Iterator[str]:
    if not report.loras:
        return
    yield from _table(
        [
            ("LoRA", "layers", "kinds", "ranks", "in the file", "on the card"),
            *(
                (
                    Path(row.path).name,
                    _layers(row),
                    _counts(row.kinds),
                    _counts(row.ranks),
                    mebibytes(row.file_bytes),
                    mebibytes(row.card_bytes),
                )
                for row in report.loras
            ),
        ]
    )
    yield ""


def _layers(row: LoraRow) -> str:
    text = f" + {row.text_layers} text" if row.text_layers else ""
    return f"{row.layers}{text}"


def _counts(found: Mapping[str, int] | Mapping[int, int]) -> str:
    """The commonest first: `16, 32`."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    shown = ", ".join(str(value) for value, _ in ordered[:3])
    return shown + (", …" if len(ordered) > 3 else "") or "none"


def _segments(report: PlanReport, blocks: str) -> list[tuple[str, str, int]]:
    """What takes the card's memory, from its start: mark, name, bytes."""
    budget, plan = report.budget, report.plan
    return [
        (blocks[0], "diffusion model", max(0, budget.base_bytes - plan.offloaded_bytes)),
        (blocks[1], "LoRA factors", plan.resident_bytes),
        (blocks[2], "branch workspace", budget.workspace_bytes + _buffers(report)),
        (blocks[3], "generation itself", budget.inference_bytes),
        (blocks[4], "margin", budget.margin_bytes),
    ]


def _comment(report: PlanReport, name: str) -> str:
    """What a line of the legend needs to be said about its number."""
    if name == "generation itself":
        return "the host's estimate" if report.estimated else "as given"
    if name == "diffusion model" and report.plan.offloaded_bytes:
        return f"{mebibytes(min(report.plan.offloaded_bytes, report.budget.base_bytes))} more in RAM"
    joined = report.budget.factor_bytes - sum(row.card_bytes for row in report.loras)
    if name == "LoRA factors" and report.plan.streamed_bytes:
        return f"{mebibytes(report.plan.streamed_bytes)} more streamed"
    if name == "LoRA factors" and joined > 0:
        return f"{mebibytes(joined)} of it because LoRAs that share layers take the widest type"
    return ""


def _buffers(report: PlanReport) -> int:
    """What streaming takes beside the factors that stay."""
    peak: int = report.plan.peak_bytes
    resident: int = report.plan.resident_bytes
    return max(0, peak - resident - report.budget.workspace_bytes)


def _bar(segments: list[tuple[str, str, int]], total: int, unicode: bool) -> str:
    """The segments to scale; the end of the card is marked where they go beyond it."""
    whole = max(total, sum(size for _, _, size in segments), 1)
    drawn, before = "", 0
    for mark, _, size in segments:
        before += size
        drawn += mark * (round(BAR_WIDTH * before / whole) - len(drawn))
    empty, end = (EMPTY, END) if unicode else (".", "|")
    card = round(BAR_WIDTH * total / whole)
    drawn = drawn.ljust(card, empty)
    return f"{end}{drawn[:card]}{end}{drawn[card:]}"


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Columns as wide as their longest cell; from the third on, to the right."""
    rows = [tuple(map(plain, row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
