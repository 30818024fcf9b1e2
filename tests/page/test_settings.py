"""Every setting of the section changes what it says it changes, once it is applied, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from lib_precision_lora.ui.settings import OPTIONS
from tests.page.browser import Page, Server

pytestmark = pytest.mark.xdist_group("page")

PROMPT = "a cat<lora:cats:0.8>"
EXACT = 1e-5

EFFECTS: Mapping[str, Mapping[Any, tuple[str, Any]]] = {
    "precision_lora_enabled": {True: ("enabled", True), False: ("enabled", False)},
    "precision_lora_compute": {
        "Automatic": ("compute", "auto"),
        "fp16": ("compute", "fp16"),
        "fp32": ("compute", "fp32"),
    },
    "precision_lora_dense": {
        "Automatic": ("dense", "auto"),
        "Always beside the weights": ("dense", "branch"),
        "Merge": ("dense", "merge"),
    },
    "precision_lora_dora_norm": {
        "As it was trained": ("stock_dora_norm", False),
        "As stock Forge does": ("stock_dora_norm", True),
    },
    "precision_lora_text_encoders": {True: ("text_encoders", True), False: ("text_encoders", False)},
    "precision_lora_on_failure": {
        "Continue without it": ("on_failure", "continue"),
        "Stop the generation": ("on_failure", "stop"),
    },
    "precision_lora_placement": {
        "Automatic": ("stream_all", False),
        "Always streamed from RAM": ("stream_all", True),
    },
    "precision_lora_margin": {0: ("margin_bytes", 0), 640: ("margin_bytes", 640 * 2**20)},
    "precision_lora_cache": {1024: ("cache_bytes", 2**30), 2048: ("cache_bytes", 2 * 2**30)},
    "precision_lora_log_detail": {"Normal": ("detailed_log", False), "Detailed": ("detailed_log", True)},
}
"""Option → what can be chosen → which field of what the library reads then has which value."""

DEPENDENT = [key for key in EFFECTS if key != "precision_lora_enabled"]


def test_every_choice_of_every_option_is_clicked_below() -> None:
    for option in OPTIONS:
        chosen = EFFECTS[option.key]
        assert option.default in chosen
        assert set(option.component_args.get("choices", chosen)) == set(chosen)
        assert len(chosen) > 1


def test_an_option_changes_what_it_says_and_nothing_else(page: Page, server: Server) -> None:
    before = server.state
    page.go_to("Settings")
    for option in OPTIONS:
        key, default = option.key, option.default
        for value in [*(value for value in EFFECTS[key] if value != default), default]:
            page.set(key, value)
            assert page.apply_settings() == f"1 settings changed: {key}."
            field, expected = EFFECTS[key][value]
            state = server.state
            assert state["settings"] == {**before["settings"], field: expected}
            assert state["saved"] == {**before["saved"], key: value}
    assert page.apply_settings() == "0 settings changed: ."


def test_what_is_applied_stands_in_the_page_that_is_opened_next(page: Page, server: Server) -> None:
    page.go_to("Settings")
    page.set("precision_lora_compute", "fp32")
    page.set("precision_lora_margin", 640)
    page.apply_settings()
    page.open()
    page.go_to("Settings")
    row = page.setting("precision_lora_compute")
    row.locator("label.selected", has_text="fp32").wait_for()
    assert page.setting("precision_lora_margin").locator("input[type=number]").input_value() == "640"


def test_what_is_not_applied_changes_nothing(page: Page, server: Server) -> None:
    before = server.state
    page.go_to("Settings")
    page.set("precision_lora_enabled", False)
    page.set("precision_lora_compute", "fp16")
    page.go_to("Txt2img")
    page.generate(PROMPT)
    assert server.state["settings"] == before["settings"]
    assert server.seen["settings"] == before["settings"]
    assert server.seen["branches"] > 0


def test_switched_off_loras_are_the_webuis_and_switched_on_ours(page: Page, server: Server) -> None:
    for on in (False, True):
        page.go_to("Settings")
        page.set("precision_lora_enabled", on)
        page.apply_settings()
        page.go_to("Txt2img")
        page.generate(PROMPT)
        page.wait_for_applied("LoRAs applied" if on else "LoRAs left to the WebUI", "cats")
        seen = server.seen
        assert (seen["branches"] > 0, seen["merged"] > 0) == (on, not on)
        assert (seen["error"] < EXACT) is on


def test_while_off_the_accordions_compute_mode_means_nothing(page: Page, server: Server) -> None:
    page.go_to("Settings")
    page.set("precision_lora_enabled", False)
    page.apply_settings()
    page.go_to("Txt2img")
    page.switch(True)
    page.choose("compute", "fp16")
    assert "mode" not in page.generate(PROMPT)
    page.wait_for_applied("LoRAs left to the WebUI")
    assert server.seen["branches"] == 0
    assert server.seen["merged"] > 0


def test_a_generation_is_stopped_where_that_is_set(page: Page, server: Server) -> None:
    page.generate("a dog<lora:nobody:1>")
    page.wait_for_applied("LoRA nobody was left out")
    page.go_to("Settings")
    page.set("precision_lora_on_failure", "Stop the generation")
    page.apply_settings()
    page.go_to("Txt2img")
    count = len(server.state["seen"])
    page.generate("a cat<lora:cats:1><lora:nobody:1>")
    page.wait_for_applied("The generation did not finish", "LoRA nobody was left out")
    assert len(server.state["seen"]) == count, "it was sampled"


def test_while_switched_off_the_other_options_look_idle_before_anything_is_applied(page: Page) -> None:
    page.go_to("Settings")
    for on in (False, True, False):
        page.set("precision_lora_enabled", on)
        looks = {key: page.setting(key).evaluate("row => getComputedStyle(row).opacity") for key in DEPENDENT}
        assert looks == dict.fromkeys(DEPENDENT, "1" if on else "0.5")
    assert page.setting("precision_lora_enabled").evaluate("row => getComputedStyle(row).opacity") == "1"
