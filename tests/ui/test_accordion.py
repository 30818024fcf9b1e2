"""The accordion's components and how they are wired, over a gradio that only remembers."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib_precision_lora.ui.choices import AS_SET, COMPUTE_CHOICES, OURS, PATCHERS
from tests.ui.fake_gradio import Component, FakeGradio

ROOT = Path(__file__).resolve().parents[2]
LOW_BITS = (AS_SET, "Automatic", "bnb-nf4")


@pytest.fixture
def gradio() -> Iterator[FakeGradio]:
    """In gradio's place, for the accordion alone; the real one, where there is one, comes back."""
    fake = FakeGradio()
    module = "lib_precision_lora.ui.accordion"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", fake)
        patch.delitem(sys.modules, module, raising=False)
        yield fake
    sys.modules.pop(module, None)


def build(gradio: FakeGradio, tab: str, applied: Any = str) -> Any:
    accordion = importlib.import_module("lib_precision_lora.ui.accordion")
    return accordion.build_panel(
        lambda value, **options: gradio.make("InputAccordion", value, **options), tab, LOW_BITS, applied
    )


def test_the_controls_come_in_the_order_of_the_scripts_arguments(gradio: FakeGradio) -> None:
    controls: list[Component] = build(gradio, "txt2img").controls
    assert [control.kind for control in controls] == ["InputAccordion", "Dropdown", "Dropdown", "Dropdown"]
    assert [control.value for control in controls] == [False, AS_SET, AS_SET, OURS]
    assert [control.options.get("choices") for control in controls[1:]] == [
        list(LOW_BITS),
        list(COMPUTE_CHOICES),
        list(PATCHERS),
    ]
    assert all(control.options["label"] and control.options["elem_id"] for control in controls)


def test_the_choices_lie_in_the_accordion_and_what_was_applied_under_it(gradio: FakeGradio) -> None:
    panel = build(gradio, "txt2img")
    assert all(panel.enabled in control.parents for control in panel.controls[1:])
    assert panel.applied.parents == ()


@pytest.mark.parametrize("tab", ["txt2img", "img2img"])
def test_the_pages_script_finds_the_button_that_asks_for_what_was_applied(
    gradio: FakeGradio, tab: str
) -> None:
    panel = build(gradio, tab, applied=lambda task: f"<p>{task}</p>")
    (button,) = [component for component in gradio.made if component.clicks]
    (click,) = button.clicks
    assert click["fn"]("task(7)") == "<p>task(7)</p>"
    assert click["outputs"] == [panel.applied]
    assert click["queue"] is False, "it would wait behind the next generation"
    script = (ROOT / "javascript/precision_lora_applied.js").read_text()
    assert f"`{button.options['elem_id']}`".replace(tab, "${tab}") in script
    called = re.search(r"precisionLoraTask\('(\w+)'\)", click["js"])
    assert called is not None
    assert called[1] == tab
    assert "window.precisionLoraTask" in script


def test_the_two_tabs_share_no_element(gradio: FakeGradio) -> None:
    build(gradio, "txt2img")
    build(gradio, "img2img")
    names = [component.options["elem_id"] for component in gradio.made if "elem_id" in component.options]
    assert len(names) == len(set(names)) == 14
