"""An inspected file as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lib_precision_lora.plain_text import plain, plain_lines
from lib_precision_lora.report.inspect_file import Inspection
from lib_precision_lora.report.quantities import mebibytes

SHOWN_KEYS = 20


def inspection_text(inspection: Inspection) -> str:
    """The file in a few lines, its layers, and what is wrong with it."""
    unmatched = inspection.unmatched
    hidden = len(unmatched) - SHOWN_KEYS
    return plain_lines(
        [
            inspection.path,
            f"layout     {inspection.layout}",
            f"size       {mebibytes(inspection.nbytes)}",
            f"layers     {len(inspection.layers)}",
            f"kinds      {counts(inspection.kinds)}",
            f"ranks      {counts(inspection.ranks)}",
            f"alphas     {counts(inspection.alphas)}",
            f"unmatched  {len(unmatched)} keys",
            *(f"           {key}" for key in unmatched[:SHOWN_KEYS]),
            *([f"           and {hidden} more; --json lists all"] if hidden > 0 else []),
            "",
            *layer_lines(inspection),
            *([f"FINDING  {finding}" for finding in inspection.findings] or ["No findings."]),
        ]
    )


def layer_lines(inspection: Inspection) -> Iterable[str]:
    names = [plain(layer.name) for layer in inspection.layers]
    width = max(map(len, names), default=0)
    for name, layer in zip(names, inspection.layers, strict=True):
        rank = "" if layer.rank is None else f"rank {layer.rank}"
        alpha = "" if layer.alpha is None else f"alpha {layer.alpha:g}"
        columns = f"{name:<{width}}  {layer.kind:<6}  {rank:<9}  {alpha:<11}"
        yield f"{columns}  {layer.nbytes} bytes"
    if inspection.layers:
        yield ""


def counts(found: Mapping[str, int] | Mapping[int, int] | Mapping[float, int]) -> str:
    """`16 (304 layers), 32 (8 layers)`."""
    return (
        ", ".join(
            f"{value:g} ({count} layers)" if isinstance(value, float) else f"{value} ({count} layers)"
            for value, count in found.items()
        )
        or "none"
    )
