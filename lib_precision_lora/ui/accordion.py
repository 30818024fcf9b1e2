"""The accordion "Precision LoRA" of txt2img and img2img, and under it what was applied."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from lib_precision_lora.ui.choices import AS_SET, COMPUTE_CHOICES, OURS, PATCHERS
from lib_precision_lora.ui.html import render

TITLE = "Precision LoRA"
LOW_BITS_LABEL, LOW_BITS_INFO = "Diffusion in Low Bits", "A change loads the checkpoint anew."
COMPUTE_LABEL, COMPUTE_INFO = "Compute mode", "How the products of LoRAs are computed."
PATCHER_LABEL, PATCHER_INFO = "LoRAs are applied by", "The WebUI's own ways are there to compare with."
SCOPE = "For this generation only; settings stay as they are."
TEXTS = (
    TITLE,
    LOW_BITS_LABEL,
    LOW_BITS_INFO,
    COMPUTE_LABEL,
    COMPUTE_INFO,
    PATCHER_LABEL,
    PATCHER_INFO,
    SCOPE,
    AS_SET,
    *COMPUTE_CHOICES,
    *PATCHERS,
)
"""All that the accordion says, for translators."""


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """The components. applied: what the last generation of this page applied."""

    enabled: Any
    low_bits: Any
    compute: Any
    patcher: Any
    applied: Any

    @property
    def controls(self) -> list[Any]:
        """In the order in which they are arguments of the script."""
        return [self.enabled, self.low_bits, self.compute, self.patcher]


def build_panel(
    accordion: Callable[..., Any],
    tab: str,
    low_bits: Sequence[str],
    applied: Callable[[str], str],
) -> Panel:
    """accordion: the WebUI's `InputAccordion`, a checkbox that opens; tab: "txt2img" or "img2img"; low_bits:
    what the host can load, `AS_SET` first; applied: the HTML of a task by its id, which
    `javascript/precision_lora_applied.js` asks for when a generation has ended.
    """
    name = f"precision_lora_{tab}"
    with accordion(False, label=TITLE, elem_id=name) as enabled:
        gr.HTML(render("scope.html", SCOPE=SCOPE), elem_classes=["precision-lora-scope"])
        with gr.Row(elem_classes=["precision-lora-choices"]):
            choices = [
                gr.Dropdown(
                    label=label,
                    info=info,
                    choices=list(values),
                    value=value,
                    elem_id=f"{name}_{part}",
                    min_width=200,
                )
                for part, label, info, values, value in (
                    ("low_bits", LOW_BITS_LABEL, LOW_BITS_INFO, low_bits, AS_SET),
                    ("compute", COMPUTE_LABEL, COMPUTE_INFO, COMPUTE_CHOICES, AS_SET),
                    ("patcher", PATCHER_LABEL, PATCHER_INFO, PATCHERS, OURS),
                )
            ]
    report = gr.HTML("", elem_id=f"{name}_applied", elem_classes=["precision-lora-applied"])
    task = gr.Textbox("", visible=False, elem_id=f"{name}_task")
    refresh = gr.Button("", visible=False, elem_id=f"{name}_refresh")
    refresh.click(
        applied,
        inputs=[task],
        outputs=[report],
        js=f"() => [precisionLoraTask('{tab}')]",
        show_progress="hidden",
        queue=False,
    )
    return Panel(enabled, *choices, report)


def build_note(sentence: str) -> Any:
    """In the place of the accordion: one line of text, where there is nothing to choose."""
    return gr.HTML(html.escape(sentence))
