"""The settings section "Precision LoRA": keys, labels and what each one does, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SECTION = ("precision_lora", "Precision LoRA")
ENABLED = "precision_lora_enabled"
COMPUTE = "precision_lora_compute"
ON_FAILURE = "precision_lora_on_failure"
DORA_NORM = "precision_lora_dora_norm"
LOG_DETAIL = "precision_lora_log_detail"
CONTINUE, STOP = "Continue without it", "Stop the generation"
AS_TRAINED, AS_STOCK = "As it was trained", "As stock Forge does"
NORMAL, DETAILED = "Normal", "Detailed"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting, as the WebUI's options want it; component: by its name in gradio, None for the usual one
    of the default's type."""

    key: str
    default: Any
    label: str
    info: str
    component: Literal["Radio"] | None = None
    component_args: Mapping[str, Any] = field(default_factory=dict)


OPTIONS = (
    Option(
        ENABLED,
        True,
        "Enable Precision LoRA",
        "LoRAs are computed beside the checkpoint and never merged into it; takes effect at the next "
        "generation; off leaves LoRAs to the WebUI",
    ),
    Option(
        COMPUTE,
        "Automatic",
        "Compute mode",
        "Automatic: the fastest that stays exact; fp16: half-precision products everywhere; fp32: full "
        "precision everywhere, slower",
        "Radio",
        {"choices": ["Automatic", "fp16", "fp32"]},
    ),
    Option(
        DORA_NORM,
        AS_TRAINED,
        "DoRA norm",
        "stock Forge takes the norm of the layer without the LoRA, which is not how a DoRA was trained; "
        "choose it to make old images again",
        "Radio",
        {"choices": [AS_TRAINED, AS_STOCK]},
    ),
    Option(
        ON_FAILURE,
        CONTINUE,
        "When a LoRA cannot be applied",
        "a damaged file, or one for another model; the page, the log and the image's parameters say which",
        "Radio",
        {"choices": [CONTINUE, STOP]},
    ),
    Option(
        LOG_DETAIL,
        NORMAL,
        "Log detail",
        "normal: a line for each LoRA; detailed: every key that belongs to no layer, too",
        "Radio",
        {"choices": [NORMAL, DETAILED]},
    ),
)
