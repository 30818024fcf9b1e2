"""The demo's result as text."""

from __future__ import annotations

from collections.abc import Sequence

from lib_precision_lora.report.demo.result import DemoResult, Row
from lib_precision_lora.report.quantities import duration, mebibytes

HEADINGS = ("stored", "error", "attach", "forward", "extra", "error", "merge", "transient")


def demo_text(result: DemoResult) -> str:
    """The table of the demo, with what its columns mean."""
    rows = [HEADINGS, *(cells(row) for row in result.rows)]
    complete = [row for row in rows if len(row) == len(HEADINGS)]
    widths = [max(len(row[column]) for row in complete) for column in range(len(HEADINGS))]
    ours = sum(widths[1:5]) + 3 * 2
    gap = " " * (widths[0] + 2)
    verdict = [f"FINDING  {finding}" for finding in result.findings] or [
        f"All {len(result.rows)} errors beside the base are within {result.limit:.0e} (law 2), and every "
        "stored weight kept its bytes (law 1)."
    ]
    return "\n".join(
        [
            f"A LoRA of rank {result.rank} with ‖Δ‖ = {100 * result.delta_ratio:.2f} % of ‖W‖ on "
            f"{result.parameters / 1e6:.1f} million weights: {result.blocks} Flux-like blocks, hidden width "
            f"{result.hidden}, {result.tokens} tokens.",
            f"Files written to and read from disk; on the CPU; compute mode {result.compute}; "
            f"{result.seconds:.0f} s in all.",
            "",
            f"{gap}{'Precision LoRA, beside the base':<{ours}}    stock-like merge, in bf16",
            *(line(row, widths) for row in rows),
            "",
            "error      effective delta: ‖(W_eff − W0) − Δ‖ / ‖Δ‖; 0 is exact, 1 is as much error as LoRA",
            "forward    one pass with the LoRA, and its ratio to one without; fastest of several",
            "extra      the factors, and what the peak of torch's memory in a forward grew by",
            "transient  the most that is held at once while one layer is merged",
            "stock-like: a model, in this library, of what stock Forge does; not Forge itself.",
            "",
            *verdict,
            "",
        ]
    )


def cells(row: Row) -> tuple[str, ...]:
    ours, stock = row.ours, row.stock
    ratio = ours.forward_seconds / ours.base_forward_seconds
    left = (
        row.stored,
        f"{ours.error:.1e}",
        duration(ours.attach_seconds),
        f"{duration(ours.forward_seconds)} ({ratio:.2f}×)",
        mebibytes(ours.extra_bytes),
    )
    if stock is None:
        return (*left, f"refused ({row.refused})")
    right = f"{stock.error:.3g}", duration(stock.merge_seconds), mebibytes(stock.transient_bytes)
    return (*left, *right)


def line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Columns two spaces apart, the two sides four; a refusal takes the whole right side."""
    padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
    return ("  ".join(padded[:5]) + "    " + "  ".join(padded[5:])).rstrip()
