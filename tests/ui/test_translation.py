"""Simplified Chinese has a text for each of ours, as it stands in the page."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from lib_precision_lora.ui import applied, settings
from lib_precision_lora.ui.choices import AS_SET, FP16_LORA
from lib_precision_lora.ui.settings import OPTIONS, SECTION
from tests.ui.fake_gradio import FakeGradio

FILE = Path(__file__).resolve().parents[2] / "localizations/zh_CN.json"
UNTRANSLATED = {"Precision LoRA", "fp16", "fp32", "Alpha"}
"""Names, which are the same in Chinese."""


def accordion_texts() -> set[str]:
    """All that stands on its components, but for the host's own names under "Diffusion in Low Bits"."""
    fake = FakeGradio()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", fake)
        patch.delitem(sys.modules, "lib_precision_lora.ui.accordion", raising=False)
        accordion = importlib.import_module("lib_precision_lora.ui.accordion")
        sys.modules.pop(accordion.__name__)
    accordion.build_panel(
        lambda value, **options: fake.make("InputAccordion", value, **options), "txt2img", [AS_SET], str
    )
    found = {re.sub("<.*?>", "", part.value) for part in fake.made if part.kind in ("HTML", "Button")}
    for part in fake.made:
        found |= {part.options.get("label", ""), part.options.get("info", "")}
        found |= set(part.options.get("choices", ()))
    assert found - {""} == set(accordion.TEXTS)
    return set(accordion.TEXTS)


def texts() -> set[str]:
    """The settings' texts (the WebUI puts an explanation in brackets), the accordion's, the report's, and the
    one sentence below images that is always the same."""
    found = {SECTION[1], *accordion_texts(), *applied.TEXTS, FP16_LORA}
    for option in OPTIONS:
        found |= {option.label, f"({option.info})", *option.component_args.get("choices", ())}
    return found


def test_every_text_has_a_translation_and_no_translation_is_left_over() -> None:
    translations = json.loads(FILE.read_text(encoding="utf-8"))
    assert translations.keys() == texts()


def test_translations_are_chinese() -> None:
    translations = json.loads(FILE.read_text(encoding="utf-8"))
    for text, translation in translations.items():
        assert (text in UNTRANSLATED) == (text == translation), text
        assert text in UNTRANSLATED or re.search(r"[\u4e00-\u9fff]", translation), text


def test_the_report_has_no_word_that_translators_do_not_know() -> None:
    """Every word goes through one function, with a name of this module; each such name is in TEXTS."""
    words = {
        name
        for name, value in vars(applied).items()
        if name.isupper() and isinstance(value, str) and value not in applied.TEXTS
    }
    assert words == set()
    assert len(applied.TEXTS) == len(set(applied.TEXTS)) > 20
    assert settings.SECTION[1] in json.loads(FILE.read_text(encoding="utf-8"))
