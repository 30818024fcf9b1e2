"""The accordion in a running Forge: choosing, what the page then says was applied, and the way back from an
image's parameters; the API's generations."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lib_precision_lora import __version__
from lib_precision_lora.host.generation.infotext import LOW_BITS, MARK, MODE, VERSION
from lib_precision_lora.ui.choices import AS_SET, COMPUTE_MODES, FP16_LORA, OURS, STOCK_MERGE
from tests.running.page import VIEWPORT
from tests.running.panel_page import NARROW, PanelPage
from tests.running.webui import REPOSITORY, ServerError, WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

PROMPT = "a cat <lora:strong:0.8><lora:nowhere:1>"
CALLS, CLIENTS = 200, 25


@pytest.fixture(scope="module")
def webui(start: Callable[..., WebUI], folder: Path) -> Iterator[WebUI]:
    """A Forge with the extension, whose API asks for credentials."""
    data, models = folder / "webui", folder / "models"
    with start(data, models, extension=True, credentials="tester:secret") as webui:
        webui.wait_until_ready()
        webui.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield webui


@pytest.fixture
def page(webui: WebUI, browser: BrowserContext) -> Iterator[PanelPage]:
    page = PanelPage(browser, webui.url)
    yield page
    assert page.errors == []
    page.close()


def test_what_is_chosen_for_one_generation_is_what_the_page_says_of_it_and_of_no_other(
    page: PanelPage, webui: WebUI
) -> None:
    page.toggle()
    page.choose("compute", "fp16")
    position = webui.log_position()
    page.generate(PROMPT)
    text = page.wait_for_applied("fp16")
    assert "strong\nStrength\n0.8\nKind\n165 × lora rank 8\nAlpha\n4\nLayers\n93 model, 72 text" in text
    assert "nowhere\nLeft out\nLoRA nowhere was left out: there is no file of this name" in text
    assert re.search(r"Time per model pass\n[\d.]+ m?s, of them for LoRAs [\d.]+ ms \([\d.]+ %\)", text)
    assert re.search(r"LoRA factors on the device\npredicted [\d.]+ [MK]iB\nmeasured [\d.]+ [MK]iB\n", text)
    assert f"{MODE}: fp16" in page.infotext
    assert f"{MARK}: {__version__}" in page.infotext
    assert "1 of 2 LoRAs applied: compute mode fp16" in webui.log(position)
    page.toggle()
    page.generate("a dog <lora:strong:1>")
    text = page.wait_for_applied("Automatic")
    assert "nowhere" not in text
    assert "fp16" not in text
    assert MODE not in page.infotext


def test_without_loras_the_page_says_nothing(page: PanelPage) -> None:
    page.generate("a plain road <lora:strong:1>")
    page.wait_for_applied("strong")
    page.generate("a road")
    page.applied.wait_for(state="hidden")


def test_the_webuis_own_way_is_said_to_be_its_own(page: PanelPage) -> None:
    page.toggle()
    page.choose("patcher", STOCK_MERGE)
    page.generate("a house <lora:strong:0.7>")
    text = page.wait_for_applied("LoRAs left to the WebUI")
    assert "strong\nStrength\n0.7" in text
    assert "LoRAs applied" not in text
    assert f"{MODE}: {STOCK_MERGE}" in page.infotext
    assert f"{MARK}: " not in page.infotext


def test_an_image_brings_its_choices_back_through_png_info(page: PanelPage, webui: WebUI) -> None:
    image = webui.generate("a cat <lora:strong:0.8>", **script([True, "float8-e4m3fn", "fp32"]))
    assert f"{MARK}: {__version__}, {MODE}: fp32, {LOW_BITS}: float8-e4m3fn" in image.infotext
    page.send_from_png_info(image.png)
    page.wait_until(lambda: page.choice("compute") == "fp32")
    assert page.enabled
    assert page.choice("low_bits") == "float8-e4m3fn"
    assert page.choice("patcher") == OURS
    page.send_from_png_info(webui.generate("a cat <lora:strong:0.8>").png)
    page.wait_until(lambda: not page.enabled)
    assert page.choice("compute") == page.choice("low_bits") == AS_SET


def test_of_parameters_of_another_version_the_valid_part_is_pasted_and_the_page_names_the_rest(
    page: PanelPage,
) -> None:
    parameters = PngInfo()
    parameters.add_text(
        "parameters",
        "a cat\nSteps: 2, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x64, "
        f"{MODE}: fp99, {LOW_BITS}: bnb-nf4, {VERSION}: 9.9, Precision LoRA colour: blue",
    )
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png", pnginfo=parameters)
    page.send_from_png_info(file.getvalue())
    page.wait_until(lambda: page.choice("low_bits") == "bnb-nf4")
    assert page.choice("compute") == AS_SET
    said = page.warnings.inner_text()
    assert f'"{MODE}: fp99" is none of' in said
    assert '"Precision LoRA colour" was written by version 9.9' in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "takes 3 or 4 arguments"),
        ([True, AS_SET], "takes 3 or 4 arguments"),
        ([True, AS_SET, AS_SET, OURS, 1], "and was given 5"),
        (["yes", AS_SET, AS_SET], "enabled must be true or false, not 'yes'"),
        ([True, "nf5", AS_SET], "low_bits must be one of .*; not 'nf5'"),
        ([True, AS_SET, 16], "compute must be one of .*; not 16"),
        ([True, AS_SET, None], "compute must be one of .*; not None"),
        ([False, AS_SET, AS_SET, "nobody"], "patcher must be one of .*; not 'nobody'"),
        ({"enabled": True}, "args must be a list"),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(webui: WebUI, arguments: Any, sentence: str) -> None:
    position = webui.log_position()
    with pytest.raises(ServerError, match=f"^422: .*Precision LoRA.*{sentence}") as refusal:
        webui.generate("a cat", **script(arguments))
    assert "Traceback" not in str(refusal.value)
    assert "Traceback" not in webui.log(position)


def test_two_hundred_calls_disturb_no_generation(webui: WebUI) -> None:
    quiet = webui.generate("a cat <lora:strong:1>", steps=12)
    with ThreadPoolExecutor(CLIENTS + 1) as threads:
        generation = threads.submit(webui.generate, "a cat <lora:strong:1>", steps=12)
        answers = list(threads.map(lambda _: webui.status(), range(CALLS)))
        assert generation.result().png == quiet.png
    assert {answer["version"] for answer in answers} == {__version__}
    assert len(answers) == CALLS


@pytest.mark.parametrize(
    ("picture", "theme", "width"),
    [
        ("accordion", "light", VIEWPORT["width"]),
        ("accordion-dark", "dark", VIEWPORT["width"]),
        ("accordion-narrow", "light", NARROW),
    ],
)
def test_it_fits_light_dark_and_narrow_pages(page: PanelPage, picture: str, theme: str, width: int) -> None:
    page.reopen(theme, width)
    page.toggle()
    page.choose("compute", COMPUTE_MODES[1])
    page.generate(f"a lamp in a {picture} {PROMPT}")
    page.wait_for_applied("nowhere")
    assert page.overflowing() == []
    page.pictured(picture)


def test_it_speaks_chinese(page: PanelPage, webui: WebUI) -> None:
    translations = json.loads((REPOSITORY / "localizations/zh_CN.json").read_text(encoding="utf-8"))
    with webui.options(localization="zh_CN"):
        page.reload_server()
        page.toggle()
        page.choose("low_bits", "Automatic (fp16 LoRA)")
        messages = page.generate("a stool " + PROMPT)
        assert translations[FP16_LORA] in messages
        text = page.wait_for_applied("nowhere")
        assert "已应用的 LoRA" in text
        assert "文本编码器" in text
        assert "计算模式" in page.accordion.inner_text()
        page.pictured("accordion-zh")
    page.reload_server()


def script(arguments: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"Precision LoRA": {"args": arguments}}}
