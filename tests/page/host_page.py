"""What the WebUI's page has beyond the double: scripts with their callbacks, and an accordion that is an
input. Modules that take the host's names in the server's process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import gradio as gr


class Script:
    """One extension's script, in one tab."""

    is_img2img = False


class ScriptCallbacks(ModuleType):
    """`on_<event>(callback)`. registered: callbacks by event, in order."""

    def __init__(self) -> None:
        super().__init__("modules.script_callbacks")
        self.registered: defaultdict[str, list[Callable[..., Any]]] = defaultdict(list)

    def __getattr__(self, name: str) -> Callable[[Callable[..., Any]], None]:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return self.registered[name.removeprefix("on_")].append


@contextmanager
def input_accordion(value: bool, label: str, elem_id: str) -> Iterator[gr.Checkbox]:
    """A checkbox, and an accordion that is open while it is checked."""
    checkbox = gr.Checkbox(value, label=label, elem_id=f"{elem_id}-checkbox")
    with gr.Accordion(label, open=value, elem_id=elem_id) as accordion:
        yield checkbox
    checkbox.change(
        lambda checked: gr.update(open=checked),
        inputs=[checkbox],
        outputs=[accordion],
        queue=False,
        show_progress="hidden",
    )


def page_modules() -> dict[str, ModuleType]:
    """By the host's names."""
    scripts = ModuleType("modules.scripts")
    scripts.Script, scripts.AlwaysVisible, scripts.scripts_data = Script, object(), []
    components = ModuleType("modules.ui_components")
    components.InputAccordion = input_accordion
    callbacks = ScriptCallbacks()
    return {module.__name__: module for module in (scripts, components, callbacks)}
