"""Our options as the host keeps them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lib_precision_lora.branch import Compute, DensePolicy
from lib_precision_lora.ui.settings import (
    AS_STOCK,
    AUTOMATIC,
    BESIDE,
    CACHE,
    COMPUTE,
    DENSE,
    DETAILED,
    DORA_NORM,
    ENABLED,
    LOG_DETAIL,
    MARGIN,
    MERGE,
    ON_FAILURE,
    OPTIONS,
    PLACEMENT,
    SECTION,
    STOP,
    STREAMED,
    TEXT_ENCODERS,
)

COMPUTE_MODES: Mapping[str, Compute] = {"Automatic": "auto", "fp16": "fp16", "fp32": "fp32"}
OFF = "precision_lora_off"
"""Key of the sentence that says why the extension is off."""

_DENSE: Mapping[str, DensePolicy] = {AUTOMATIC: "auto", BESIDE: "branch", MERGE: "merge"}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What decides the numbers: the compute mode, whose norm a DoRA has, and which layers are merged."""

    compute: Compute = "auto"
    stock_dora_norm: bool = False
    dense: DensePolicy = "auto"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user has chosen."""

    enabled: bool = True
    arithmetic: Arithmetic = Arithmetic()
    text_encoders: bool = True
    on_failure: Literal["continue", "stop"] = "continue"
    margin_bytes: int = 0
    stream_all: bool = False
    cache_bytes: int = 2**30
    detailed_log: bool = False


def read_settings(opts: Any) -> Settings:
    """The options of a WebUI; one that is not registered (yet) or nonsense has its default."""
    default = Settings()
    return Settings(
        enabled=_switch(getattr(opts, ENABLED, None), default.enabled),
        arithmetic=Arithmetic(
            COMPUTE_MODES.get(str(getattr(opts, COMPUTE, "")), default.arithmetic.compute),
            stock_dora_norm=getattr(opts, DORA_NORM, "") == AS_STOCK,
            dense=_DENSE.get(str(getattr(opts, DENSE, "")), default.arithmetic.dense),
        ),
        text_encoders=_switch(getattr(opts, TEXT_ENCODERS, None), default.text_encoders),
        on_failure="stop" if getattr(opts, ON_FAILURE, "") == STOP else default.on_failure,
        margin_bytes=_megabytes(getattr(opts, MARGIN, None), default.margin_bytes),
        stream_all=getattr(opts, PLACEMENT, "") == STREAMED,
        cache_bytes=_megabytes(getattr(opts, CACHE, None), default.cache_bytes),
        detailed_log=getattr(opts, LOG_DETAIL, "") == DETAILED,
    )


def _switch(value: Any, default: bool) -> bool:
    return value if isinstance(value, bool) else default


def _megabytes(value: Any, default: int) -> int:
    """Bytes of a number of MB that is neither nonsense nor negative."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value * 2**20) if number and 0 <= value < 2**30 else default


def register_settings(off: str | None = None) -> None:
    """Add the section "Precision LoRA" to the WebUI's settings.

    off: why the extension is off in this WebUI; then this sentence is all that the section has, since no
    option would do anything.
    """
    from modules import shared

    if off is not None:
        from modules.options import OptionHTML

        shared.opts.add_option(OFF, _in_section(OptionHTML(html.escape(off))))
        return
    import gradio

    for option in OPTIONS:
        component = None if option.component is None else getattr(gradio, option.component)
        info = shared.OptionInfo(option.default, option.label, component, option.component_args)
        shared.opts.add_option(option.key, _in_section(info.info(option.info)))


def _in_section(info: Any) -> Any:
    info.section = SECTION
    return info
