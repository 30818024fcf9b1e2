"""The WebUI's X/Y/Z plot over its API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.running.webui import Generation, WebUI

CHOSEN = {"Draw legend": False, "Include Sub Images": True}
"""What a plot here has; all else is as the page begins with it."""


def plot(webui: WebUI, prompt: str, *axes: tuple[str, Sequence[str]], **parameters: Any) -> list[Generation]:
    """The cells of a plot, row by row.

    axes: for X, Y and Z, as far as given, the axis's name and its values, which the host takes from a list
    where the axis has choices, and from a text where it has none.
    """
    given = _arguments(webui)
    labels = next(argument["choices"] for argument in given if argument["label"] == "X type")
    arguments: list[Any] = []
    for name, values in [*axes, *[("Nothing", ())] * (3 - len(axes))]:
        arguments += [labels.index(name), ", ".join(values), list(values)]
    arguments += [CHOSEN.get(each["label"], each["value"]) for each in given[len(arguments) :]]
    return webui.generate_all(prompt, script_name="X/Y/Z plot", script_args=arguments, **parameters)


def _arguments(webui: WebUI) -> list[dict[str, Any]]:
    """What the script takes, in order: with its label, the value it begins with, and its choices."""
    arguments: list[dict[str, Any]] = next(
        script["args"]
        for script in webui.get("script-info")
        if script["name"] == "x/y/z plot" and not script["is_img2img"]
    )
    return arguments
