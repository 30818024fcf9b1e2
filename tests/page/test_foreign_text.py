"""Names that are HTML, in a real page: they are read there, and nothing of them is made."""

from __future__ import annotations

import pytest

from tests.page.browser import Page

IMAGE = "<img src=x onerror=document.title='RAN' "
"""Without its end, which a prompt's brackets could not hold: what follows on a page would close it."""

FOREIGN = "script, img, [onerror]"


def untouched(page: Page) -> bool:
    """No element of a name is in the page, and no code of one ran."""
    images = page.page.locator("img[src=x]").count()
    return images == 0 and page.page.title() != "RAN"


def test_a_name_of_the_prompt_is_text_under_the_image_and_in_what_was_applied(page: Page) -> None:
    infotext = page.generate(f"a cat <lora:{IMAGE}:1><lora:cats:0.5>")
    applied = page.wait_for_applied("cats", "Left out")
    assert IMAGE.strip() in applied
    assert IMAGE.strip() in page.messages
    assert "Precision LoRA skipped" in infotext
    assert page.part("_applied").locator(FOREIGN).count() == 0
    assert untouched(page)


@pytest.mark.parametrize("name", ["Precision LoRA mode", "Precision LoRA low bits"])
def test_a_value_that_is_pasted_pops_up_as_text(page: Page, name: str) -> None:
    page.go_to("Paste")
    (said,) = page.paste(**{name: f"{IMAGE}>"})
    assert f"{IMAGE}>" in said
    assert page.page.locator(".toast-body").locator("img, script, [onerror]").count() == 0
    assert untouched(page)


def test_a_name_that_is_pasted_pops_up_as_text_and_a_flood_of_them_does_not(page: Page) -> None:
    page.go_to("Paste")
    said = page.paste(**{f"Precision LoRA {number} {IMAGE}>": "1" for number in range(100)})
    assert len(said) == 9
    assert sum(f"{IMAGE}>" in text for text in said) == 8
    assert sum("92 more parts" in text for text in said) == 1
    assert untouched(page)
