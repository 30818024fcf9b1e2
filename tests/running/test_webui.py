"""The whole way through a running Forge: its API and its page, on a small random SD 1.5 checkpoint.

Two servers run, one with the extension and one without, which is the reference. Each keeps everything that
it writes in a temporary folder.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lib_precision_lora import __version__
from tests.running.checkpoint import make_checkpoint, make_lora, save_lora
from tests.running.damaged import DAMAGES, truncate
from tests.running.page import Page
from tests.running.webui import Generation, ServerError, WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

CHECKPOINT = "Stable-diffusion/small.safetensors"
ROUNDING = 2
"""Grey levels by which two exact ways to the same image may differ."""

VISIBLE = 20
"""Grey levels by which an image has to change for it to have been LoRA's doing."""

RAM_NOISE = 32 * 2**20
"""Bytes by which a process that holds nothing more may have grown: less than one copy of a LoRA's layers."""

SKIPPED = "Precision LoRA skipped: "


@pytest.fixture(scope="module")
def models(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The models folder of both servers: one checkpoint and its LoRAs, sound and damaged ones.

    It is removed at the end: pytest would keep half a gigabyte of each of the last three runs.
    """
    folder = tmp_path_factory.mktemp("models")
    checkpoint = folder / CHECKPOINT
    make_checkpoint(host_root, checkpoint)
    strong = make_lora(checkpoint, rank=8, seed=1)
    loras = folder / "Lora"
    save_lora(loras / "strong.safetensors", strong)
    save_lora(loras / "other.safetensors", make_lora(checkpoint, rank=4, seed=2))
    save_lora(loras / "faint.safetensors", make_lora(checkpoint, rank=4, seed=3, size=0.05))
    for name, damage in DAMAGES.items():
        save_lora(loras / f"{name}.safetensors", damage(strong))
    truncate(loras / "strong.safetensors", loras / "truncated.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def servers(
    start: Callable[..., WebUI], models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[WebUI, WebUI]]:
    """Forge without the extension, and with it; they start side by side."""
    data = tmp_path_factory.mktemp("servers")
    with (
        start(data / "stock", models, extension=False) as stock,
        start(data / "webui", models, extension=True) as webui,
    ):
        for server in (stock, webui):
            server.wait_until_ready()
            server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield stock, webui


@pytest.fixture(scope="module")
def stock(servers: tuple[WebUI, WebUI]) -> WebUI:
    """Forge without the extension."""
    return servers[0]


@pytest.fixture(scope="module")
def webui(servers: tuple[WebUI, WebUI]) -> WebUI:
    """Forge with the extension."""
    return servers[1]


@pytest.fixture(scope="module")
def base(webui: WebUI) -> Generation:
    """The image without any LoRA."""
    return webui.generate("a cat")


@pytest.fixture(scope="module")
def strong(webui: WebUI) -> Generation:
    """The image with the LoRA that most tests use, at full strength."""
    return ours(webui, "a cat <lora:strong:1>")


@pytest.fixture
def page(webui: WebUI, browser: BrowserContext) -> Iterator[Page]:
    page = Page(browser, webui.url)
    yield page
    assert page.errors == []
    page.close()


def test_without_a_lora_the_file_is_that_of_forge_without_the_extension(
    webui: WebUI, stock: WebUI, base: Generation
) -> None:
    assert base.png == stock.generate("a cat").png
    assert base.pixels.std() > 20, "an image of nothing proves nothing"


def test_an_image_that_we_made_is_told_from_one_of_forge_without_the_extension(
    webui: WebUI, stock: WebUI, base: Generation, strong: Generation
) -> None:
    mark = f", Precision LoRA: {__version__}"
    assert mark in strong.infotext
    assert "Precision LoRA" not in stock.generate("a cat <lora:strong:1>").infotext
    assert "Precision LoRA" not in base.infotext
    image = base64.b64encode(strong.png).decode()
    assert webui.post("png-info", {"image": image})["parameters"]["Precision LoRA"] == __version__


def test_ten_times_the_same_file_is_told_with_the_sum(webui: WebUI) -> None:
    half, parts = ours(webui, "a cat <lora:strong:0.5>"), ours(webui, "a cat " + "<lora:strong:0.05>" * 10)
    assert parts.difference(half) <= ROUNDING
    (file,) = webui.status()["last_generation"]["files"]
    assert (file["name"], file["strength"], file["text_strength"]) == ("strong", 0.5, 0.5)


def test_switching_off_and_on_acts_at_the_next_generation(
    webui: WebUI, stock: WebUI, strong: Generation
) -> None:
    reference = stock.generate("a cat <lora:strong:1>")
    assert strong.difference(reference) <= ROUNDING
    with webui.options(precision_lora_enabled=False):
        position = webui.log_position()
        assert webui.generate("a cat <lora:strong:1>").png == reference.png
        assert "[Precision LoRA]" not in webui.log(position)
    assert ours(webui, "a cat <lora:strong:1>").png == strong.png


@pytest.mark.parametrize(
    "loras",
    [
        "<lora:strong:0.5>",
        "<lora:strong:-0.7>",
        "<lora:strong:te=1:unet=0>",
        "<lora:strong:te=0.2:unet=0.9>",
        "<lora:strong:0.8><lora:other:0.6>",
    ],
)
def test_a_prompt_means_what_it_means_to_forge(
    webui: WebUI, stock: WebUI, base: Generation, loras: str
) -> None:
    image = ours(webui, f"a cat {loras}")
    assert image.difference(base) > VISIBLE
    assert image.difference(stock.generate(f"a cat {loras}")) <= ROUNDING


def test_a_lora_leaves_nothing_behind(webui: WebUI, base: Generation, strong: Generation) -> None:
    half = ours(webui, "a cat <lora:strong:0.5>")
    assert half.difference(strong) > VISIBLE
    assert ours(webui, "a cat <lora:strong:1>").png == strong.png
    assert ours(webui, "a cat <lora:strong:0>").same_pixels(base)
    assert webui.generate("a cat").png == base.png


def test_the_same_lora_twice_adds_up(webui: WebUI, strong: Generation) -> None:
    twice = ours(webui, "a cat <lora:strong:0.5><lora:strong:0.5>")
    assert twice.difference(strong) <= ROUNDING
    assert twice.difference(ours(webui, "a cat <lora:strong:0.5>")) > VISIBLE


def test_the_hires_prompt_may_have_another_lora(webui: WebUI, stock: WebUI) -> None:
    hires = webui.hires()
    same = webui.generate("a cat <lora:strong:1>", **hires)
    hires["hr_prompt"] = "a cat <lora:other:1>"
    other = webui.generate("a cat <lora:strong:1>", **hires)
    assert min(other.pixels.shape[:2]) > 64
    assert other.difference(same) > VISIBLE
    assert other.difference(stock.generate("a cat <lora:strong:1>", **hires)) <= ROUNDING


def test_a_change_of_compute_mode_acts_at_the_next_generation(webui: WebUI, strong: Generation) -> None:
    with webui.options(precision_lora_compute="fp16"):
        assert 0 < ours(webui, "a cat <lora:strong:1>").difference(strong) <= ROUNDING
    with webui.options(precision_lora_compute="fp32"):
        assert ours(webui, "a cat <lora:strong:1>").same_pixels(strong)


@pytest.mark.parametrize("name", ["truncated", "nowhere", *DAMAGES])
def test_a_lora_that_cannot_be_applied_is_left_out_whole_and_named(
    webui: WebUI, base: Generation, strong: Generation, name: str
) -> None:
    webui.generate("a cat <lora:other:1>")
    position = webui.log_position()
    image = webui.generate(f"a cat <lora:{name}:1>")
    assert image.same_pixels(base), "part of the damaged file, or the LoRA before it, is in this image"
    assert f"{SKIPPED}{name}" in image.infotext
    complaints = [line for line in webui.log(position).splitlines() if "left out" in line]
    assert len(complaints) == 1
    assert name in complaints[0]
    beside = webui.generate(f"a cat <lora:{name}:1><lora:strong:1>")
    assert beside.same_pixels(strong)
    assert f"{SKIPPED}{name}" in beside.infotext


@pytest.mark.parametrize("name", ["nowhere", "truncated", "nan_in_model"])
def test_a_generation_is_stopped_where_that_is_set(webui: WebUI, base: Generation, name: str) -> None:
    with webui.options(precision_lora_on_failure="Stop the generation"):
        with pytest.raises(ServerError, match=f"500.*{name}.*The generation was stopped"):
            webui.generate(f"a cat <lora:{name}:1>")
        assert webui.generate("a cat").png == base.png


def test_a_file_written_over_is_read_again(webui: WebUI, models: Path) -> None:
    path = models / "Lora/retrained.safetensors"
    save_lora(path, make_lora(models / CHECKPOINT, rank=4, seed=4))
    before = ours(webui, "a cat <lora:retrained:1>")
    path.write_bytes((models / "Lora/other.safetensors").read_bytes())
    after = ours(webui, "a cat <lora:retrained:1>")
    assert after.difference(before) > VISIBLE
    assert after.same_pixels(ours(webui, "a cat <lora:other:1>"))


def test_a_change_of_loras_moves_no_model(webui: WebUI) -> None:
    webui.generate("a cat <lora:strong:1>")
    position = webui.log_position()
    ours(webui, "a cat <lora:strong:0.3>")
    ours(webui, "a cat <lora:other:1>")
    webui.generate("a cat")
    assert not [line for line in webui.log(position).splitlines() if line.startswith(webui.moved)]


def test_ten_changes_of_strength_move_no_model(webui: WebUI) -> None:
    webui.generate("a cat <lora:strong:1>")
    position = webui.log_position()
    for step in range(10):
        ours(webui, f"a cat <lora:strong:{0.1 * (step + 1):.1f}>")
    assert not [line for line in webui.log(position).splitlines() if line.startswith(webui.moved)]


def test_a_hundred_changes_leave_nothing_in_ram(webui: WebUI) -> None:
    """Half of the changes come first: the host's own caches fill with them."""
    prompts = [
        f"a cat <lora:{name}:{strength / 100:.2f}>"
        for strength in range(1, 51)
        for name in ("strong", "other")
    ]
    for prompt in prompts[:50]:
        webui.generate(prompt, steps=1)
    before = webui.resident_bytes()
    for prompt in prompts[50:]:
        webui.generate(prompt, steps=1)
    assert webui.resident_bytes() - before < RAM_NOISE


def test_a_lora_on_a_float8_checkpoint_is_that_on_the_exact_one(
    webui: WebUI, stock: WebUI, base: Generation
) -> None:
    """The checkpoint's weights are float8 values, so that its fp32 run is what float8 should look like."""
    prompt = "a cat <lora:faint:1>"
    exact = stock.generate(prompt)
    with webui.stored_as("float8-e4m3fn"):
        assert webui.generate("a cat").same_pixels(base)
        branched = ours(webui, prompt)
        assert "fp8-e4m3fn" in webui.status()["last_generation"]["stored"]
    with stock.stored_as("float8-e4m3fn"):
        merged = stock.generate(prompt)
    assert exact.difference(base) > VISIBLE
    assert branched.difference(exact) <= ROUNDING
    assert merged.difference(exact) > ROUNDING, "this image does not show what the extension is for"
    assert webui.generate("a cat").png == base.png


def test_the_settings_have_a_section_that_applies(page: Page, webui: WebUI) -> None:
    section = page.open_settings()
    page.screenshot("settings", section)
    assert section.evaluate("part => part.scrollWidth <= part.clientWidth")
    enabled = section.get_by_label("Enable Precision LoRA")
    dependent = [
        section.locator(f"#setting_precision_lora_{name}")
        for name in ("compute", "dora_norm", "on_failure", "log_detail")
    ]
    for value, opacity in ((False, "0.5"), (True, "1")):
        enabled.set_checked(value)
        assert [row.evaluate("row => getComputedStyle(row).opacity") for row in dependent] == [opacity] * len(
            dependent
        )
        page.apply_settings()
        page.wait_until(lambda value=value: webui.settings()["precision_lora_enabled"] is value)


def test_the_page_shows_what_was_left_out(page: Page, webui: WebUI) -> None:
    position = webui.log_position()
    assert "left out" not in page.generate("a hill <lora:strong:1>")
    assert applied(webui.log(position)) == ["strong"]
    messages = page.generate("a pond <lora:truncated:1>")
    assert "LoRA truncated was left out: truncated.safetensors: the file is truncated: it has" in messages
    page.screenshot("left-out", page.results)
    assert "left out" not in page.generate("a road")


def test_reloading_the_page_server_leaves_one_binding(
    page: Page, webui: WebUI, base: Generation, strong: Generation
) -> None:
    page.reload_server()
    position = webui.log_position()
    page.generate("a lake <lora:strong:1>")
    assert applied(webui.log(position)) == ["strong"]
    assert webui.generate("a cat").png == base.png
    assert ours(webui, "a cat <lora:strong:1>").png == strong.png


def applied(log: str) -> list[str]:
    """The LoRAs that the log calls applied; lines of progress, on a busy machine, are none of them."""
    return re.findall(r"\[Precision LoRA\] LoRA (.*): \d+ layers of the model at ", log)


def ours(webui: WebUI, prompt: str) -> Generation:
    """An image made with the LoRAs of the prompt, by this extension and without complaints."""
    position = webui.log_position()
    image = webui.generate(prompt)
    log = webui.log(position)
    assert len(applied(log)) == prompt.count("<lora:"), log
    assert "left out" not in log
    assert SKIPPED not in image.infotext
    return image
