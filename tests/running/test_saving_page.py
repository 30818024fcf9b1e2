"""The buttons "Save UNet" and "Save Checkpoint" in the page of a running WebUI, with a LoRA active."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors.torch

from tests.running.checkpoint import UNET
from tests.running.page import Page
from tests.running.test_webui import ROUNDING, VISIBLE
from tests.running.webui import WebUI

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

PROMPT = "a cat <lora:strong:1>"


@pytest.fixture(scope="module")
def page(webui: WebUI, browser: BrowserContext) -> Iterator[Page]:
    page = Page(browser, webui.url)
    yield page
    assert page.errors == []


def test_a_checkpoint_that_is_saved_with_a_lora_makes_its_image_without_it(
    webui: WebUI, page: Page, folder: Path
) -> None:
    checkpoints = folder / "models/Stable-diffusion"
    base = webui.generate("a cat")
    position = webui.log_position()
    assert "Saved with" not in page.save("Checkpoint", "plain.safetensors")
    assert "Saved with" not in webui.log(position)
    image = webui.generate(PROMPT)
    assert image.difference(base) > VISIBLE
    message = page.save("Checkpoint", "merged.safetensors")
    assert "Saved with 1 LoRA (strong) merged into " in message
    assert "costs less than 0.1 % of what they add." in message
    assert "Saved with 1 LoRA (strong) merged into " in webui.log(position)
    assert webui.generate(PROMPT).png == image.png, "saving disturbs nothing"
    files = {file.name for file in checkpoints.iterdir()}
    assert files == {"small.safetensors", "plain.safetensors", "merged.safetensors"}
    plain, merged = (
        safetensors.torch.load_file(checkpoints / f"{name}.safetensors") for name in ("plain", "merged")
    )
    assert merged.keys() == plain.keys()
    changed = [key for key in merged if not merged[key].equal(plain[key])]
    assert any(key.startswith(UNET) for key in changed)
    assert any(not key.startswith(UNET) for key in changed), "and the text encoder"
    assert len(changed) < len(merged)
    webui.post("refresh-checkpoints", {})
    webui.post("options", {"sd_model_checkpoint": "merged.safetensors"})
    try:
        again = webui.generate("a cat")
        assert again.difference(image) <= ROUNDING
    finally:
        webui.post("options", {"sd_model_checkpoint": "small.safetensors"})


def test_what_cannot_be_saved_is_said_in_the_page_and_leaves_no_file(
    webui: WebUI, page: Page, folder: Path
) -> None:
    checkpoints = folder / "models/Stable-diffusion"
    image = webui.generate(PROMPT)
    (checkpoints / "taken").mkdir()
    before = {file.name for file in checkpoints.iterdir()}
    assert "Nothing was saved: IsADirectoryError" in page.save("UNet", "taken", fails=True)
    assert {file.name for file in checkpoints.iterdir()} == before
    assert webui.generate(PROMPT).png == image.png
