"""Forge's X/Y/Z plot over its API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.running.webui import Generation, WebUI

LEGEND, SUB_IMAGES, SUB_GRIDS, FREE_SEEDS = False, True, False, False
VARY_X, VARY_Y, VARY_Z, MARGIN, AS_TEXT = False, False, False, 0, False


def plot(webui: WebUI, prompt: str, *axes: tuple[str, Sequence[str]], **parameters: Any) -> list[Generation]:
    """The cells of a plot, row by row.

    axes: for X, Y and Z, as far as given, the axis's name and its values, which the host takes from a list
    where the axis has choices, and from a text where it has none.
    """
    labels = _labels(webui)
    arguments: list[Any] = []
    for name, values in [*axes, *[("Nothing", ())] * (3 - len(axes))]:
        arguments += [labels.index(name), ", ".join(values), list(values)]
    arguments += [LEGEND, SUB_IMAGES, SUB_GRIDS, FREE_SEEDS, VARY_X, VARY_Y, VARY_Z, MARGIN, AS_TEXT]
    return webui.generate_all(prompt, script_name="X/Y/Z plot", script_args=arguments, **parameters)


def _labels(webui: WebUI) -> list[str]:
    """Of the axes, in the order in which a request numbers them."""
    choices: list[str] = next(
        argument["choices"]
        for script in webui.get("script-info")
        if script["name"] == "x/y/z plot" and not script["is_img2img"]
        for argument in script["args"]
        if argument["label"] == "X type"
    )
    return choices
