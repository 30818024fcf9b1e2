"""A generation with choices of its own, from the click that starts it to the one after it: in both tabs,
ended by the user midway, and by a page that offers what the WebUI does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lib_precision_lora.host.generation.infotext import LOW_BITS, MODE
from lib_precision_lora.ui.applied import BY_HOST, UNFINISHED
from lib_precision_lora.ui.choices import AS_SET, FP16_LORA
from tests.running.page import VIEWPORT
from tests.running.panel_page import NARROW, PanelPage
from tests.running.webui import Generation, WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

COARSE = "float8-e5m2"
STORED, AS_IN_THE_FILE = {"fp8-e5m2": 118}, {"dense-fp32": 118}
LORA = "<lora:strong:1>"
STEPS = 150
NOT_THERE = "float7"

OpenPage = Callable[[str], PanelPage]


@pytest.fixture(scope="module")
def webui(start: Callable[..., WebUI], folder: Path) -> Iterator[WebUI]:
    """A Forge with the extension; img2img's accordion begins with what another version offered."""
    defaults = {"customscript/precision_lora.py/img2img/Diffusion in Low Bits/value": NOT_THERE}
    data, models = folder / "webui", folder / "models"
    with start(data, models, extension=True, page_defaults=defaults) as webui:
        webui.wait_until_ready()
        webui.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield webui


@pytest.fixture(scope="module")
def base(webui: WebUI) -> Generation:
    return webui.generate(f"a cat {LORA}")


@pytest.fixture
def opened(webui: WebUI, browser: BrowserContext, base: Generation) -> Iterator[OpenPage]:
    """Opens the page at a tab. After the test the next generation is that of the user's settings."""
    pages: list[PanelPage] = []

    def open_page(tab: str = "txt2img") -> PanelPage:
        pages.append(PanelPage(browser, webui.url, tab))
        return pages[-1]

    before = webui.settings()
    yield open_page
    for page in pages:
        assert page.errors == []
        page.close()
    after = webui.settings()
    assert {name: after[name] for name in before} == before
    assert webui.generate(f"a cat {LORA}").same_pixels(base)


def stored(webui: WebUI) -> dict[str, int]:
    """How the weights of the last generation lay in memory."""
    kinds: dict[str, int] = webui.status()["last_generation"]["stored"]
    return kinds


def test_switched_off_in_the_settings_the_next_generation_is_the_webuis_and_on_again_ours(
    opened: OpenPage, webui: WebUI
) -> None:
    page = opened("txt2img")
    for value, said in ((False, BY_HOST), (True, "165 × lora rank 8")):
        page.open_settings().get_by_label("Enable Precision LoRA").set_checked(value)
        page.apply_settings()
        page.wait_until(lambda value=value: webui.settings()["precision_lora_enabled"] is value)
        page.generate(f"a cat, {value} {LORA}")
        assert ("LoRAs applied" in page.wait_for_applied(said)) is value


def test_img2img_has_choices_of_its_own_and_says_what_was_applied(
    opened: OpenPage, webui: WebUI, base: Generation
) -> None:
    page = opened("img2img")
    page.upload(base.png)
    page.toggle()
    assert page.choice("low_bits") == AS_SET, "a default that this WebUI does not offer"
    page.choose("low_bits", COARSE)
    page.generate(f"a house {LORA}")
    assert "Layers\n93 model, 72 text" in page.wait_for_applied(COARSE)
    assert f"{LOW_BITS}: {COARSE}" in page.infotext
    assert "Denoising strength" in page.infotext
    assert stored(webui) == STORED
    page.toggle()
    page.generate(f"a tower {LORA}")
    assert COARSE not in page.wait_for_applied("dense-fp32")
    assert LOW_BITS not in page.infotext
    assert stored(webui) == AS_IN_THE_FILE


def test_send_to_img2img_takes_the_choices_along(opened: OpenPage, webui: WebUI) -> None:
    page = opened("txt2img")
    page.toggle()
    page.choose("low_bits", COARSE)
    page.choose("compute", "fp16")
    page.generate(f"a pond {LORA}")
    page.press("send_to_img2img")
    page.tab = "img2img"
    page.wait_until(lambda: page.enabled)
    assert (page.choice("low_bits"), page.choice("compute")) == (COARSE, "fp16")
    page.generate(f"a pond, again {LORA}")
    page.wait_for_applied(COARSE)
    assert f"{MODE}: fp16, {LOW_BITS}: {COARSE}" in page.infotext
    assert stored(webui) == STORED


@pytest.mark.parametrize("button", ["interrupt", "skip"])
def test_a_generation_ended_midway_has_been_as_the_page_says(
    opened: OpenPage, webui: WebUI, button: str
) -> None:
    page = opened("txt2img")
    page.set_steps(STEPS)
    page.toggle()
    page.choose("low_bits", COARSE)
    position = webui.log_position()
    page.start(f"a lake, {button} {LORA}")
    webui.wait_for_step(2, STEPS)
    page.press(button)
    page.wait_for_image(f"a lake, {button}")
    assert f"{STEPS}/{STEPS}" not in webui.log(position)
    text = page.wait_for_applied(COARSE)
    assert "strong\nStrength\n1\nKind\n165 × lora rank 8" in text
    assert (UNFINISHED in text) is (button == "interrupt")
    assert stored(webui) == STORED
    page.toggle()
    page.set_steps(2)
    page.generate(f"a lake, whole {LORA}")
    assert UNFINISHED not in page.wait_for_applied("dense-fp32")


def test_what_this_webui_does_not_offer_is_as_set_and_the_page_says_so(
    opened: OpenPage, webui: WebUI
) -> None:
    page = opened("txt2img")
    page.send_as_another_version(COARSE, NOT_THERE)
    page.toggle()
    page.choose("low_bits", COARSE)
    page.choose("compute", "fp16")
    messages = page.generate(f"a road {LORA}")
    assert f"Diffusion in Low Bits is {AS_SET}: there is no '{NOT_THERE}' here, but" in messages
    text = page.wait_for_applied("fp16")
    assert NOT_THERE not in text
    assert f"{MODE}: fp16" in page.infotext
    assert LOW_BITS not in page.infotext
    assert stored(webui) == AS_IN_THE_FILE


def test_what_fp16_lora_means_is_said_below_the_first_such_image(opened: OpenPage, webui: WebUI) -> None:
    page = opened("txt2img")
    page.toggle()
    page.choose("low_bits", f"{COARSE} (fp16 LoRA)")
    position = webui.log_position()
    assert FP16_LORA in page.generate(f"a rose {LORA}")
    page.wait_for_applied(f"{COARSE} (fp16 LoRA)")
    assert FP16_LORA not in page.generate(f"two roses {LORA}")
    assert webui.log(position).count(FP16_LORA) == 1


@pytest.mark.parametrize(
    ("picture", "theme", "width"),
    [
        ("settings-dark", "dark", VIEWPORT["width"]),
        ("settings-narrow", "light", NARROW),
    ],
)
def test_the_settings_fit_dark_and_narrow_pages(
    opened: OpenPage, picture: str, theme: str, width: int
) -> None:
    page = opened("txt2img")
    page.reopen(theme, width)
    section = page.open_settings()
    page.screenshot(picture, section)
    assert page.overflowing_parts("#settings_precision_lora, #settings_precision_lora *") == []
