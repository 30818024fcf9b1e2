"""The accordion in a page of gradio: every control changes what it says it changes, for one generation."""

from __future__ import annotations

from typing import Any

import pytest

from lib_precision_lora import __version__
from tests.page.browser import Page, Server, row

pytestmark = pytest.mark.xdist_group("page")

PROMPT = "a cat<lora:cats:0.8>"
AS_SET, OURS, MERGE, ONLINE = "as set above", "Precision LoRA", "stock Forge merge", "stock Forge (fp16 LoRA)"
NOTHING = {"low_bits": AS_SET, "compute": AS_SET, "patcher": OURS}
LOW_BITS = [
    *(AS_SET, "Automatic", "Automatic (fp16 LoRA)", "bnb-nf4", "bnb-nf4 (fp16 LoRA)"),
    *("float8-e4m3fn", "float8-e4m3fn (fp16 LoRA)", "bnb-fp4", "bnb-fp4 (fp16 LoRA)"),
    *("float8-e5m2", "float8-e5m2 (fp16 LoRA)"),
]
"""The double's own list, as the real Forge has it."""

EXACT = 1e-5


def test_every_control_offers_what_there_is(page: Page) -> None:
    page.switch(True)
    assert page.choices("low_bits") == LOW_BITS
    assert page.choices("compute") == [AS_SET, "Automatic", "fp16", "fp32"]
    assert page.choices("patcher") == [OURS, MERGE, ONLINE]


def test_a_storage_type_is_that_of_its_generation_alone(page: Page, server: Server) -> None:
    before = server.state
    for name, storage in (
        ("float8-e4m3fn", "torch.float8_e4m3fn"),
        ("Automatic", "torch.float32"),
        ("float8-e5m2 (fp16 LoRA)", "torch.float8_e5m2"),
    ):
        page.switch(True)
        page.choose("low_bits", name)
        infotext = page.generate(PROMPT)
        assert f"Precision LoRA: {__version__}, Precision LoRA low bits: {name}" in infotext
        page.wait_for_applied(row("Diffusion in Low Bits", name))
        check(server, before, {**NOTHING, "low_bits": name})
        assert server.seen["storage"] == storage
        page.switch(False)
        assert "low bits" not in page.generate("a dog<lora:cats:0.8>")
        check(server, before, NOTHING)
        assert server.seen["storage"] == "torch.float32"


def test_a_compute_mode_is_that_of_its_generation(page: Page, server: Server) -> None:
    before = server.state
    page.switch(True)
    for name, mode in (("fp16", "fp16"), ("Automatic", "auto"), ("fp32", "fp32"), (AS_SET, "auto")):
        page.choose("compute", name)
        infotext = page.generate(PROMPT)
        assert (f"Precision LoRA mode: {name}" in infotext) is (name in ("fp16", "fp32"))
        page.wait_for_applied(row("Compute mode", "Automatic" if mode == "auto" else name))
        check(server, before, {**NOTHING, "compute": name}, compute=mode)
        assert (server.seen["error"] < EXACT) is (mode != "fp16")


def test_loras_are_applied_by_whom_it_says(page: Page, server: Server) -> None:
    before = server.state
    page.switch(True)
    page.choose("low_bits", "float8-e4m3fn")
    for name, way in ((MERGE, "merged"), (OURS, "branches"), (ONLINE, "online")):
        page.choose("patcher", name)
        page.generate(PROMPT)
        page.wait_for_applied("LoRAs applied 1" if name == OURS else "LoRAs left to the WebUI 1")
        asked = {**NOTHING, "patcher": name, "low_bits": "float8-e4m3fn"}
        check(server, before, asked, enabled=name == OURS)
        assert [each for each in ("branches", "merged", "online") if server.seen[each]] == [way]


def test_while_it_is_closed_its_choices_mean_nothing(page: Page, server: Server) -> None:
    before = server.state
    page.switch(True)
    for control, value in (("low_bits", "float8-e5m2"), ("compute", "fp16"), ("patcher", MERGE)):
        page.choose(control, value)
    page.switch(False)
    assert page.generate(PROMPT).endswith(f", Precision LoRA: {__version__}")
    page.wait_for_applied("LoRAs applied", "Automatic")
    check(server, before, NOTHING)
    assert server.state["loads"] == []
    page.switch(True)
    page.generate("a dog<lora:cats:0.8>")
    page.wait_for_applied("LoRAs left to the WebUI")
    check(
        server,
        before,
        {"low_bits": "float8-e5m2", "compute": "fp16", "patcher": MERGE},
        compute="fp16",
        enabled=False,
    )


def test_a_storage_type_that_the_card_cannot_quantize_to_is_refused_with_the_reason(
    page: Page, server: Server
) -> None:
    before = server.state
    page.switch(True)
    page.choose("low_bits", "bnb-nf4")
    assert "low bits" not in page.generate(PROMPT)
    assert "Diffusion in Low Bits stays as set above: bnb-nf4 was asked for, but " in page.messages
    check(server, before, NOTHING)
    assert server.state["loads"] == []


def test_what_was_applied_stands_under_the_accordion_of_the_tab_that_asked(
    page: Page, server: Server
) -> None:
    page.generate("a cat<lora:cats:0.5:0.8><lora:dogs:-1><lora:nobody:1>")
    text = page.wait_for_applied("LoRAs applied 2", "left out 1")
    assert "cats\nStrength\n0.8 (text encoder 0.5)\nKind\n5 × lora rank 2\nAlpha\n1\nLayers\n" in text
    assert "dogs\nStrength\n-1\nKind\n5 × lora rank 3\nAlpha\n1.5\nLayers\n4 model, 1 text encoder" in text
    assert "nobody\nLeft out\nLoRA nobody was left out: there is no file of this name" in text
    page.generate("a road")
    page.part("_applied").wait_for(state="hidden")
    page.go_to("Img2img")
    page.part("_applied").wait_for(state="hidden")
    page.switch(True)
    page.choose("compute", "fp32")
    page.generate("a dog<lora:dogs:0.6>")
    text = page.wait_for_applied("LoRAs applied 1", row("Compute mode", "fp32"))
    assert "cats" not in text
    assert server.seen["override"] == {**NOTHING, "compute": "fp32"}
    page.go_to("Txt2img")
    page.generate(PROMPT)
    page.wait_for_applied("LoRAs applied 1", "cats", row("Compute mode", "Automatic"))
    assert server.seen["override"] == NOTHING


def check(server: Server, before: dict[str, Any], override: dict[str, str], **fields: Any) -> None:
    """This was in effect in the last generation; of the settings, these alone were others in it, and nothing
    has remained of it."""
    state = server.state
    assert state["seen"][-1]["override"] == override
    assert state["seen"][-1]["settings"] == {**before["settings"], **fields}
    assert (state["settings"], state["saved"]) == (before["settings"], before["saved"])
