"""The demo's errors as a bar chart, by matplotlib, which nothing else here needs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lib_precision_lora.report.demo.result import DemoResult

CHART_SUFFIXES = (".png", ".svg")
OURS_COLOUR, STOCK_COLOUR, TEXT_COLOUR = "#0072b2", "#d55e00", "#333333"
FLOOR, CEILING = 1e-9, 1e4
BAR_WIDTH = 0.38


class MissingMatplotlibError(ImportError):
    """The chart's one dependency is not installed."""


def figure_class() -> Any:
    """Raises MissingMatplotlibError."""
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise MissingMatplotlibError(
            "The chart needs the Python package matplotlib; install it with: pip install matplotlib."
        ) from error


def write_chart(result: DemoResult, path: Path) -> None:
    """Writes PNG or SVG, by the ending of the path. Raises MissingMatplotlibError."""
    figure = figure_class()(figsize=(9, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(result.rows):
        bar(
            axes,
            place - BAR_WIDTH / 2,
            row.ours.error,
            OURS_COLOUR,
            f"{row.ours.error:.0e}".replace("e-0", "e-"),
        )
        if row.stock is not None:
            bar(axes, place + BAR_WIDTH / 2, row.stock.error, STOCK_COLOUR, f"{row.stock.error:.2g}")
        else:
            axes.annotate(
                f"refused: {row.refused}",
                (place + BAR_WIDTH / 2, 1.6 * FLOOR),
                ha="center",
                fontsize=8,
                rotation=90,
                color=STOCK_COLOUR,
            )
    axes.axhline(1, color=TEXT_COLOUR, linewidth=0.8, linestyle="--", zorder=1)
    axes.annotate(
        "as much error as LoRA",
        (len(result.rows) - 0.55, 1.25),
        ha="left",
        fontsize=8,
        color=TEXT_COLOUR,
        annotation_clip=False,
    )
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, CEILING)
    axes.set_xlim(-0.6, len(result.rows) + 0.5)
    axes.set_xticks(range(len(result.rows)), [row.stored for row in result.rows])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("‖(W_eff − W0) − Δ‖ / ‖Δ‖", fontsize=10)
    axes.set_xlabel("base weight as it is stored in the checkpoint", fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure, axes)
    figure.savefig(path, facecolor="white")


def bar(axes: Any, place: float, error: float, colour: str, text: str) -> None:
    """One bar from the floor of the axis, its value above it."""
    axes.bar(place, max(error, FLOOR), BAR_WIDTH, color=colour, zorder=2)
    axes.annotate(text, (place, 1.3 * max(error, FLOOR)), ha="center", fontsize=8.5, color=TEXT_COLOUR)


def legend(figure: Any, axes: Any) -> None:
    figure.suptitle(
        "Error in what a LoRA adds to each weight (lower is better; logarithmic)",
        fontsize=12,
        color=TEXT_COLOUR,
    )
    handles = [
        axes.bar(0, 0, color=colour, label=label)
        for colour, label in (
            (OURS_COLOUR, "Precision LoRA, beside the base"),
            (STOCK_COLOUR, "stock-like merge, in bf16"),
        )
    ]
    axes.legend(handles=handles, loc="upper right", ncols=2, fontsize=9, frameon=False)
