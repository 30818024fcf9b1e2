"""What is written into an image's parameters, and read back from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_precision_lora import __version__
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.notices import INFOTEXT_SKIPPED
from lib_precision_lora.host.generation.pop_ups import pop_up
from lib_precision_lora.ui.choices import AS_SET, COMPUTE_MODES, OURS, PATCHERS

logger = logging.getLogger("lib_precision_lora")

MARK = "Precision LoRA"
"""On every image whose LoRAs were applied by us; its value is our version."""
MODE, LOW_BITS, VERSION = f"{MARK} mode", f"{MARK} low bits", f"{MARK} version"
PREFIX = f"{MARK} "
CHOICES = (MODE, LOW_BITS, VERSION, MARK)
OURS_IN_INFOTEXT = (*CHOICES, INFOTEXT_SKIPPED)
SIZE_LIKE = (f"{INFOTEXT_SKIPPED}-1", f"{INFOTEXT_SKIPPED}-2")
"""What the host reads where the one file that was left out is named like a size, 512x512."""
DEFAULT_MODE = COMPUTE_MODES[0]
MOST_POP_UPS = 8
MODES = (*COMPUTE_MODES, *(patcher for patcher in PATCHERS if patcher != OURS))
"""All that `MODE` can say: a compute mode of ours, or which of the host's ways it was instead."""


def parameters(mode: str, low_bits: str, ours: bool) -> dict[str, str]:
    """What an image says of itself: that its LoRAs were applied by us, if so, and what is not the default;
    and by which version.

    mode: one of `MODES`; low_bits: a name of the host, or `AS_SET`.
    """
    written = {MARK: __version__} if ours else {}
    if mode != DEFAULT_MODE:
        written[MODE] = mode
    if low_bits != AS_SET:
        written[LOW_BITS] = low_bits
    return {**written, VERSION: __version__} if written and not ours else written


def begin(p: Any) -> None:
    """Nothing of ours is written of a generation that begins.

    The cells of a plot are copies of one object that share their parameters: what an earlier cell has written
    there stays its own, and this one gets a dictionary without it.
    """
    present = getattr(p, "extra_generation_params", {})
    if any(name in present for name in OURS_IN_INFOTEXT):
        p.extra_generation_params = {
            name: value for name, value in present.items() if name not in OURS_IN_INFOTEXT
        }


@dataclass(frozen=True, slots=True)
class Pasted:
    """What an image's parameters choose in the accordion.

    problems: a sentence for each part that cannot be chosen here.
    """

    enabled: bool = False
    low_bits: str = AS_SET
    compute: str = AS_SET
    patcher: str = OURS
    problems: tuple[str, ...] = ()


def read_parameters(values: Mapping[str, Any], low_bits_choices: Sequence[str]) -> Pasted:
    """The choices that make such an image again; what is not understood is left out, and said."""
    mode, low_bits = str(values.get(MODE, DEFAULT_MODE)), str(values.get(LOW_BITS, AS_SET))
    version = values.get(MARK, values.get(VERSION, "unknown"))
    problems = []
    if mode not in MODES:
        problems.append(f'"{MODE}: {mode}" is none of {", ".join(MODES)}, and was not set')
        mode = DEFAULT_MODE
    if low_bits not in low_bits_choices:
        problems.append(f'"{LOW_BITS}: {low_bits}" is not known to this WebUI, and was not set')
        low_bits = AS_SET
    for name in values:
        if name.startswith(PREFIX) and name not in (*OURS_IN_INFOTEXT, *SIZE_LIKE):
            problems.append(
                f'"{name}" was written by version {version} and means nothing to '
                f"version {__version__}; it was not set"
            )
    compute = mode if mode in COMPUTE_MODES and mode != DEFAULT_MODE else AS_SET
    patcher = mode if mode in PATCHERS else OURS
    enabled = (low_bits, compute, patcher) != (AS_SET, AS_SET, OURS)
    return Pasted(enabled, low_bits, compute, patcher, tuple(problems))


def pasted(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """What to paste into a control: `name` is that of a field of `Pasted`."""

    def read(values: Mapping[str, Any]) -> Any:
        return getattr(read_parameters(values, _low_bits_choices()), name)

    return read


FIELDS = tuple(pasted(name) for name in ("enabled", "low_bits", "compute", "patcher"))
"""By control, in their order; the same objects in every tab, so that the host can send one tab's choices to
the other's."""


def warn_of_what_is_not_pasted(infotext: str, values: Mapping[str, Any]) -> None:
    """Once for each paste, in the page and in the log. Who wrote the infotext may have written much: the page
    shows the first `MOST_POP_UPS` of it."""
    if installation.active() is None:
        return
    problems = [f"{problem}." for problem in read_parameters(values, _low_bits_choices()).problems]
    hidden = len(problems) - MOST_POP_UPS
    if hidden > 0:
        problems[MOST_POP_UPS:] = [f"{hidden} more parts of the image's parameters were not set."]
    for problem in problems:
        logger.warning("%s", problem)
        pop_up(problem)


def _low_bits_choices() -> list[str]:
    from lib_precision_lora.host.generation import override

    return override.low_bits_choices()
