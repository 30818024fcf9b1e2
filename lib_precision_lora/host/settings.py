"""Our options as the host keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lib_precision_lora.branch import Compute
from lib_precision_lora.ui.settings import (
    AS_STOCK,
    COMPUTE,
    DETAILED,
    DORA_NORM,
    ENABLED,
    LOG_DETAIL,
    ON_FAILURE,
    OPTIONS,
    SECTION,
    STOP,
)

_COMPUTE: Mapping[str, Compute] = {"Automatic": "auto", "fp16": "fp16", "fp32": "fp32"}


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What decides the numbers of a branch: the compute mode, and whose norm a DoRA has."""

    compute: Compute = "auto"
    stock_dora_norm: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user has chosen."""

    enabled: bool = True
    arithmetic: Arithmetic = Arithmetic()
    on_failure: Literal["continue", "stop"] = "continue"
    detailed_log: bool = False


def read_settings(opts: Any) -> Settings:
    """The options of a WebUI; one that is not registered (yet) or nonsense has its default."""
    default = Settings()
    enabled = getattr(opts, ENABLED, default.enabled)
    return Settings(
        enabled=enabled if isinstance(enabled, bool) else default.enabled,
        arithmetic=Arithmetic(
            _COMPUTE.get(str(getattr(opts, COMPUTE, "")), default.arithmetic.compute),
            stock_dora_norm=getattr(opts, DORA_NORM, "") == AS_STOCK,
        ),
        on_failure="stop" if getattr(opts, ON_FAILURE, "") == STOP else default.on_failure,
        detailed_log=getattr(opts, LOG_DETAIL, "") == DETAILED,
    )


def register_settings() -> None:
    """Add the section "Precision LoRA" to the WebUI's settings."""
    import gradio
    from modules import shared

    for option in OPTIONS:
        component = None if option.component is None else getattr(gradio, option.component)
        info = shared.OptionInfo(option.default, option.label, component, option.component_args)
        info.section = SECTION
        shared.opts.add_option(option.key, info.info(option.info))
