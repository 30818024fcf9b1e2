"""What a generation applied, as HTML: the values of `templates/applied.html`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lib_precision_lora.report.quantities import duration, mebibytes, part_of
from lib_precision_lora.ui.html import render

if TYPE_CHECKING:
    from lib_precision_lora.host.generation.report import FileReport, GenerationReport

SHOWN_KEYS = 20
"""How many keys without a layer are listed; the log has the others."""

APPLIED, LEFT_OUT, BY_HOST = "LoRAs applied", "left out", "LoRAs left to the WebUI"
NONE, UNFINISHED = "No LoRA was applied.", "The generation did not finish. Until then:"
KIND, STRENGTH, LAYERS, MODEL, TEXT = "Kind", "Strength", "Layers", "model", "text encoder"
ALPHA, HOST_LAYERS, SKIPPED, REASON = "Alpha", "of them by the WebUI", "Keys without a layer", "Left out"
FINDINGS = "Findings"
COMPUTE, LOW_BITS, STORED, TIME = "Compute mode", "Diffusion in Low Bits", "Stored weights", "Time to attach"
PRODUCTS, QUANTIZED, DEQUANTIZED = "Products with the base", "quantized", "dequantized"
TEXT_ENCODERS, SWITCHED_OFF = "Text encoders", "left alone, as set in Settings"
BY_LAYER = "by layer"
STEP, FOR_LORAS = "Time per model pass", "of them for LoRAs"
MEMORY, PLANNED, MEASURED = "LoRA factors on the device", "predicted", "measured"
STREAMED, EXTRA = "Streamed from RAM", "Predicted peak for LoRAs"
TEXTS = (
    *(APPLIED, LEFT_OUT, BY_HOST, NONE, UNFINISHED, KIND, STRENGTH, LAYERS, MODEL, TEXT, ALPHA),
    *(HOST_LAYERS, FINDINGS, SKIPPED, REASON, COMPUTE, TEXT_ENCODERS, SWITCHED_OFF, LOW_BITS, STORED, TIME),
    *(PRODUCTS, QUANTIZED, DEQUANTIZED),
    *(BY_LAYER, STEP, FOR_LORAS, MEMORY, PLANNED, MEASURED, STREAMED, EXTRA),
)
"""All words of this part of the page, for translators."""

WORDS = {
    name: value for name, value in dict(globals()).items() if name.isupper() and value in (*TEXTS, SHOWN_KEYS)
}
"""The constants above, by the names that the template has for them."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One bar. percent: of the longest one."""

    name: str
    nbytes: int
    percent: float


def applied_html(report: GenerationReport) -> str:
    """One line, which opens to the details."""
    return render(
        "applied.html",
        **WORDS,
        report=report,
        ours=report.patcher != "WebUI",
        notes=_other_problems(report),
        stored=", ".join(f"{count} × {kind}" for kind, count in report.stored.items()),
        figures=_figures(report),
        alphas=_alphas,
        duration=duration,
        mebibytes=mebibytes,
        part_of=part_of,
    )


def _alphas(file: FileReport) -> str:
    return ", ".join(f"{alpha:g}" for alpha in file.alphas)


def _figures(report: GenerationReport) -> list[Figure]:
    """A bar for each figure that there is, the longer one as wide as the page; none where there is none."""
    known = [
        (name, nbytes)
        for name, nbytes in ((PLANNED, report.planned_bytes), (MEASURED, report.measured_bytes))
        if nbytes is not None
    ]
    longest = max((nbytes for _, nbytes in known), default=0) or 1
    return [Figure(name, nbytes, 100 * nbytes / longest) for name, nbytes in known]


def _other_problems(report: GenerationReport) -> list[str]:
    named = {file.problem for file in report.files}
    return [problem for problem in report.problems if problem not in named]
