"""Forge's page in a headless Chromium, as far as the tests click through it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator

HOW_TO_RUN = (
    "needs Chromium on the PATH (Debian: apt-get install chromium), and playwright in the Python that runs "
    "the tests: pip install playwright"
)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")
VIEWPORT = {"width": 1280, "height": 1280}
PATIENCE_MS = 180_000
"""How long one click may take to have its effect; a generation takes seconds where nothing else runs."""


@contextmanager
def chromium(profile: Path) -> Iterator[BrowserContext]:
    """A browser with a profile of its own; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason=HOW_TO_RUN)
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(HOW_TO_RUN)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, args=FLAGS, viewport=VIEWPORT
        )
        browser.set_default_timeout(PATIENCE_MS)
        yield browser
        browser.close()


class Page:
    """The page of one server.

    errors: what its scripts have raised.
    """

    def __init__(self, browser: BrowserContext, url: str) -> None:
        self.errors: list[str] = []
        self._page = browser.new_page()
        self._page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._page.goto(url, wait_until="domcontentloaded")
        self.wait_until_ready()

    def close(self) -> None:
        self._page.close()

    def wait_until_ready(self) -> None:
        """Until there is a button to press, and the extensions' scripts have seen it."""
        self._page.locator("#txt2img_generate").wait_for()
        self._page.wait_for_function("window.executedOnLoaded")

    def open_settings(self) -> Locator:
        """Bring our section of the settings to the front."""
        self._page.get_by_role("tab", name="Settings", exact=True).click()
        self._page.locator("#settings > .tab-nav > button", has_text="Precision LoRA").click()
        section = self._page.locator("#settings_precision_lora")
        section.wait_for()
        return section

    def apply_settings(self) -> None:
        self._page.locator("#settings_submit").click()
        self._page.locator("#settings_result", has_text="settings changed").wait_for()

    def generate(self, prompt: str) -> str:
        """Press Generate in txt2img and wait for the image; a prompt that this page has not had yet.

        Returns the messages under the image.
        """
        self._page.get_by_role("tab", name="Txt2img", exact=True).click()
        self._page.locator("#txt2img_prompt textarea").fill(prompt)
        self._page.locator("#txt2img_generate").click()
        self._page.locator("#html_info_txt2img", has_text=prompt).wait_for()
        self._page.locator("#txt2img_gallery img").first.wait_for()
        self._page.locator("#txt2img_interrupt").wait_for(state="hidden")
        messages = self._page.locator("#html_log_txt2img .comments")
        return messages.inner_text() if messages.count() else ""

    def reload_server(self) -> None:
        """Press "Reload UI"; the page comes back by itself."""
        with self._page.expect_navigation(wait_until="domcontentloaded"):
            self._page.get_by_role("link", name="Reload UI").click()
        self.wait_until_ready()

    @property
    def results(self) -> Locator:
        """The image of txt2img and all that is written under it."""
        return self._page.locator("#txt2img_results")

    def screenshot(self, name: str, part: Locator | None = None) -> None:
        """Keep a picture of the page, or of a part of it, where PRECISION_LORA_SCREENSHOTS names a folder."""
        folder = os.environ.get("PRECISION_LORA_SCREENSHOTS")
        if folder:
            (part or self._page).screenshot(path=Path(folder) / f"{name}.png")
