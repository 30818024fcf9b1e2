"""What the WebUI's script does: the accordion, and the steps of a generation."""

from __future__ import annotations

import logging
import sys
from typing import Any

from lib_precision_lora.branch.session.undo import run_all
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation import infotext
from lib_precision_lora.host.generation.generations import COMPUTE_NAMES, GENERATIONS, log_report
from lib_precision_lora.host.page.arguments import wanted
from lib_precision_lora.host.page.settings import register_settings
from lib_precision_lora.host.page.xyz import AXES, add_axes
from lib_precision_lora.ui.choices import AS_SET, OURS

logger = logging.getLogger("lib_precision_lora")


def prepare_ui() -> None:
    """Before the page is made, or the API alone: our settings, and our axes of the plot."""
    register_settings(installation.why_off())
    add_axes()


def prepare_app(page: Any, app: Any) -> None:
    """The routes, where the WebUI was started with `--api`: without it, nothing of them is imported."""
    from modules import shared

    if shared.cmd_opts.api:
        from lib_precision_lora.host.page.api import add_api

        add_api(page, app)


def leave() -> None:
    """The WebUI lets go of the script: nothing of ours stays in its own parts."""
    routes = sys.modules.get("lib_precision_lora.host.page.api")
    run_all([installation.uninstall, *([] if routes is None else [routes.remove_api])])


def make_ui(script: Any) -> list[Any] | None:
    """The controls of one tab; their values come back as the arguments of `request_override`.

    In a WebUI that the binding does not know there is nothing to choose: a line says so, and why.
    """
    if installation.active() is None:
        off = installation.why_off()
        if off is not None:
            from lib_precision_lora.ui.accordion import build_note

            build_note(off)
        return None
    from modules.ui_components import InputAccordion

    from lib_precision_lora.host.generation import override
    from lib_precision_lora.ui.accordion import build_panel

    tab = "img2img" if script.is_img2img else "txt2img"
    panel = build_panel(InputAccordion, tab, override.low_bits_choices(), GENERATIONS.html)
    script.infotext_fields = list(zip(panel.controls, infotext.FIELDS, strict=True))
    script.paste_field_names = list(infotext.FIELDS)
    return panel.controls


def request_override(p: Any, arguments: tuple[Any, ...]) -> None:
    """Before a generation: what it wants otherwise than the settings, if anything."""
    if installation.active() is None:
        return
    from lib_precision_lora.host.generation import override

    GENERATIONS.begin(p)
    infotext.begin(p)
    fields, problems = wanted(arguments, getattr(p, AXES, {}), override.low_bits_choices())
    for problem in problems:
        sentence = f"{problem}. The settings were used instead"
        logger.warning("%s", sentence)
        p.comment(sentence)
    asked = override.Override(**fields)
    if asked != override.Override():
        override.request(p, asked)


def begin_batch(p: Any) -> None:
    """An image, or several at once, of a generation begins: before its LoRAs are set."""
    active = installation.active()
    if active is not None:
        p.precision_lora_batch = active.record.present.number


def write_parameters(p: Any) -> None:
    """Into the infotext: that LoRAs were applied by us, and mode and storage where they are not the default.

    Before a pass is sampled, and again after: what it was made with is then known. Of an earlier batch,
    nothing stays.
    """
    active = installation.active()
    if active is None:
        return
    from lib_precision_lora.host.generation import override

    present = active.record.present.number
    passes = active.record.since(min(getattr(p, "precision_lora_batch", present - 1), present))
    applied = [each for each in passes if any(file.problem is None for file in each.reports())]
    asked, mode = override.in_effect(p), infotext.DEFAULT_MODE
    if applied:
        if asked.patcher != OURS:
            mode = asked.patcher
        elif applied[-1].patcher == OURS:
            mode = COMPUTE_NAMES.get(applied[-1].compute, applied[-1].compute)
    ours = any(each.applied_by_us for each in passes)
    for name in infotext.CHOICES:
        p.extra_generation_params.pop(name, None)
    p.extra_generation_params.update(infotext.parameters(mode, asked.low_bits, ours))


def report(p: Any) -> None:
    """After a generation: what was applied, to the log and for the page."""
    if installation.active() is None:
        return
    from modules import shared

    from lib_precision_lora.host.generation import override

    low_bits = override.in_effect(p).low_bits
    if low_bits == AS_SET:
        low_bits = getattr(shared.opts, "forge_unet_storage_dtype", None)
    done = GENERATIONS.end(p, low_bits, finished=not shared.state.interrupted)
    if done is not None:
        log_report(done)


def show_notices(p: Any) -> None:
    """Bring messages about this pass's LoRAs to the page and into the infotext, before it is sampled, and
    again after: some come up when the model is placed.

    The WebUI itself collects an engine's comments once, before the first pass.
    """
    active = installation.active()
    if active is not None:
        active.notices.show(p.comment, p.extra_generation_params)


def show_late_notices(p: Any, processed: Any) -> None:
    """Put messages that came up since then under the finished image."""
    active = installation.active()
    if active is None:
        return
    for message in active.notices.unshown():
        p.comment(message)
        processed.comments += f"{message}\n"
