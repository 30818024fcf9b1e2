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
TEXT_ENCODERS = "precision_lora_text_encoders"
PLACEMENT = "precision_lora_placement"
MARGIN = "precision_lora_margin"
CACHE = "precision_lora_cache"
STREAMED = "Always streamed from RAM"
DENSE = "precision_lora_dense"
LOG_DETAIL = "precision_lora_log_detail"
CONTINUE, STOP = "Continue without it", "Stop the generation"
AS_TRAINED, AS_STOCK = "As it was trained", "As stock Forge does"
AUTOMATIC, BESIDE, MERGE = "Automatic", "Always beside the weights", "Merge"
NORMAL, DETAILED = "Normal", "Detailed"


@dataclass(frozen=True, slots=True)
class Option:
    """One setting, as the WebUI's options want it; component: by its name in gradio, None for the usual one
    of the default's type."""

    key: str
    default: Any
    label: str
    info: str
    component: Literal["Radio", "Slider"] | None = None
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
        DENSE,
        AUTOMATIC,
        "Full-precision checkpoints",
        "merged fp16 and fp32 layers are faster per step and slower to change, and round once; Automatic "
        "merges the layers that LoRAs would slow down in a way that is felt; all others, and all of "
        "bf16, FP8, NF4 and GGUF, are always computed beside; what was merged is put back as it was",
        "Radio",
        {"choices": [AUTOMATIC, BESIDE, MERGE]},
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
        TEXT_ENCODERS,
        True,
        "Text encoders too",
        "off: the part of a LoRA that is for text encoders is left alone, as with te=0 in the prompt",
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
        PLACEMENT,
        AUTOMATIC,
        "Where LoRA factors are kept",
        "Automatic: on the card, and in RAM where they do not fit beside the checkpoint; streamed: always in "
        "RAM, which takes the least memory of the card and costs a little time in every step",
        "Radio",
        {"choices": [AUTOMATIC, STREAMED]},
    ),
    Option(
        MARGIN,
        0,
        "Memory margin (MB)",
        "what is kept free on the card beyond what LoRAs are planned to take, for other programs",
        "Slider",
        {"minimum": 0, "maximum": 4096, "step": 64},
    ),
    Option(
        CACHE,
        1024,
        "LoRA file cache (MB of RAM)",
        "files that were used last stay in memory, so that they need not be read again; the least recently "
        "used ones go first",
        "Slider",
        {"minimum": 0, "maximum": 16384, "step": 128},
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
