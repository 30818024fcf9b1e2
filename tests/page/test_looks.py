"""How the extension looks in gradio's themes, on a narrow screen, and in Chinese."""

from __future__ import annotations

import json
import re

import pytest

from tests.page.browser import NARROW, WIDE, Page
from tests.page.conftest import ROOT

pytestmark = pytest.mark.xdist_group("page")

LONG_NAME = "a_name_without_any_space_that_goes_on_and_on_and_on_for_long"
LONG = f"a cat<lora:cats:0.5:0.8><lora:{LONG_NAME}:1>"
NO_WORDS = rf"Precision LoRA|Alpha|cats|{LONG_NAME}|LoRA {LONG_NAME} was .*|[\d.]+ \w+|(\d+ × [^,]+,? ?)+"
"""Names, amounts, and a sentence as it stands in the log: these are the same in every language."""


@pytest.mark.parametrize(("theme", "width"), [("light", NARROW), ("dark", NARROW), ("dark", WIDE)])
def test_nothing_reaches_out_of_its_place(page: Page, theme: str, width: int) -> None:
    page.open(width, __theme=theme)
    page.switch(True)
    page.generate(LONG)
    page.wait_for_applied("goes_on_and_on")
    accordion = "#precision_lora_txt2img"
    assert page.overflowing(f"{accordion}, {accordion}_applied, {accordion}_applied *") == []
    page.go_to("Settings")
    assert page.overflowing("#settings_precision_lora, #settings_precision_lora > *") == []
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_in_chinese_no_text_is_left_in_english(page: Page) -> None:
    chinese = json.loads((ROOT / "localizations/zh_CN.json").read_text(encoding="utf-8"))
    page.open(language="zh_CN")
    page.switch(True)
    page.generate(LONG)
    page.wait_for_applied("已应用的 LoRA")
    shown = page.texts("#precision_lora_txt2img, #precision_lora_txt2img_applied")
    page.go_to("Settings")
    shown |= page.texts("#settings_precision_lora")
    assert {text for text in shown if chinese.get(text, text) != text} == set()
    english = {text for text in shown if re.search("[A-Za-z]{3}", text) and not re.search("[一-鿿]", text)}
    assert {text for text in english if not re.fullmatch(NO_WORDS, text)} == set()
    assert len(shown & set(chinese.values())) > 40
