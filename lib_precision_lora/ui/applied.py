"""What a generation applied, as HTML. Words stand in elements of their own, so that the WebUI can translate
them; all that comes from files is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lib_precision_lora.report.quantities import duration, mebibytes, part_of

if TYPE_CHECKING:
    from lib_precision_lora.host.report import FileReport, GenerationReport

SHOWN_KEYS = 20
"""How many keys without a layer are listed; the log has the others."""

APPLIED, LEFT_OUT, BY_HOST = "LoRAs applied", "left out", "LoRAs left to the WebUI"
NONE, UNFINISHED = "No LoRA was applied.", "The generation did not finish. Until then:"
KIND, STRENGTH, LAYERS, MODEL, TEXT = "Kind", "Strength", "Layers", "model", "text encoder"
ALPHA, HOST_LAYERS, SKIPPED, REASON = "Alpha", "of them by the WebUI", "Keys without a layer", "Left out"
FINDINGS = "Findings"
COMPUTE, LOW_BITS, STORED, TIME = "Compute mode", "Diffusion in Low Bits", "Stored weights", "Time to attach"
TEXT_ENCODERS, SWITCHED_OFF = "Text encoders", "left alone, as set in Settings"
STEP, FOR_LORAS = "Time per model pass", "of them for LoRAs"
MEMORY, PLANNED, MEASURED = "LoRA factors on the device", "predicted", "measured"
STREAMED, EXTRA = "Streamed from RAM", "Predicted peak for LoRAs"
TEXTS = (
    *(APPLIED, LEFT_OUT, BY_HOST, NONE, UNFINISHED, KIND, STRENGTH, LAYERS, MODEL, TEXT, ALPHA),
    *(HOST_LAYERS, FINDINGS, SKIPPED, REASON, COMPUTE, TEXT_ENCODERS, SWITCHED_OFF, LOW_BITS, STORED, TIME),
    *(STEP, FOR_LORAS, MEMORY, PLANNED, MEASURED, STREAMED, EXTRA),
)
"""All words of this part of the page, for translators."""


def applied_html(report: GenerationReport) -> str:
    """One line, which opens to the details."""
    ours = report.patcher != "WebUI"
    counts = _count(APPLIED if ours else BY_HOST, len(report.applied), "applied")
    if report.left_out:
        counts += _count(LEFT_OUT, len(report.left_out), "left-out")
    files = "".join(_file(file) for file in report.files) or f"<p>{_word(NONE)}</p>"
    unfinished = "" if report.finished else f"<p>{_word(UNFINISHED)}</p>"
    notes = "".join(f"<p>{escape(text)}</p>" for text in _other_problems(report))
    details = _list(
        (COMPUTE, escape(report.compute)),
        (TEXT_ENCODERS, "" if report.text_encoders else _word(SWITCHED_OFF)),
        (LOW_BITS, escape(report.low_bits or "")),
        (STORED, escape(", ".join(f"{count} × {kind}" for kind, count in report.stored.items()))),
        (TIME, duration(report.attach_seconds) if ours and report.files else ""),
        (STEP, _step(report)),
    )
    return (
        f"<details><summary>{counts}</summary>{unfinished}{files}{notes}{details}{_memory(report)}</details>"
    )


def _file(file: FileReport) -> str:
    if file.problem is not None:
        body = _list((REASON, escape(file.problem)))
        return f'<section class="left-out"><h4>{escape(file.name)}</h4>{body}</section>'
    strength = f"{file.strength:g}"
    if file.text_strength != file.strength:
        strength += f" ({_word(TEXT)} {file.text_strength:g})"
    counts = ((MODEL, file.unet_layers), (TEXT, file.text_layers), (HOST_LAYERS, file.host_layers))
    keys = "".join(f"<li>{escape(key)}</li>" for key in file.unmatched[:SHOWN_KEYS])
    keys += "<li>…</li>" if len(file.unmatched) > SHOWN_KEYS else ""
    skipped = f"<details><summary>{len(file.unmatched)}</summary><ul>{keys}</ul></details>" if keys else ""
    findings = "".join(f"<p>{escape(finding)}</p>" for finding in file.findings)
    body = _list(
        (STRENGTH, strength),
        (KIND, escape(file.kinds)),
        (ALPHA, ", ".join(f"{alpha:g}" for alpha in file.alphas)),
        (LAYERS, ", ".join(f"{count} {_word(what)}" for what, count in counts if count)),
        (FINDINGS, findings),
        (SKIPPED, skipped),
    )
    return f"<section><h4>{escape(file.name)}</h4>{body}</section>"


def _step(report: GenerationReport) -> str:
    if report.step_seconds is None or report.overhead_seconds is None:
        return ""
    overhead = part_of(report.overhead_seconds, report.step_seconds)
    return f"{duration(report.step_seconds)}, {_word(FOR_LORAS)} {overhead}"


def _memory(report: GenerationReport) -> str:
    """A bar for each figure that there is, the longer one as wide as the page; none where there is none."""
    figures = [
        (name, nbytes)
        for name, nbytes in ((PLANNED, report.planned_bytes), (MEASURED, report.measured_bytes))
        if nbytes is not None
    ]
    if not figures:
        return ""
    longest = max(nbytes for _, nbytes in figures) or 1
    bars = "".join(
        f"<li>{_word(name)} <b>{mebibytes(nbytes)}</b>"
        f'<i class="{name}" style="width: {100 * nbytes / longest:.1f}%"></i></li>'
        for name, nbytes in figures
    )
    more = _list(
        (STREAMED, mebibytes(report.streamed_bytes) if report.streamed_bytes else ""),
        (EXTRA, mebibytes(report.extra_bytes) if report.extra_bytes else ""),
    )
    return f'<div class="memory"><h4>{_word(MEMORY)}</h4><ul>{bars}</ul>{more}</div>'


def _other_problems(report: GenerationReport) -> list[str]:
    named = {file.problem for file in report.files}
    return [problem for problem in report.problems if problem not in named]


def _list(*entries: tuple[str, str]) -> str:
    rows = "".join(f"<dt>{_word(name)}</dt><dd>{value}</dd>" for name, value in entries if value)
    return f"<dl>{rows}</dl>" if rows else ""


def _count(name: str, number: int, kind: str) -> str:
    return f'<span class="{kind}">{_word(name)} <b>{number}</b></span>'


def _word(text: str) -> str:
    return f"<span>{text}</span>"
