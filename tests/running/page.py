"""Forge's page in a headless Chromium, as far as the tests click through it."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator
    from playwright.sync_api import Page as Opened

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


def overflowing(page: Opened, parts: str) -> list[str]:
    """What is wider than its place, or reaches out of the window. parts: a selector."""
    found: list[str] = page.evaluate(
        "parts => [...document.querySelectorAll(parts)].filter(part =>"
        " part.getBoundingClientRect().right > innerWidth"
        " || (part.clientWidth && part.scrollWidth > part.clientWidth + 1)).map(part =>"
        " `${part.outerHTML.slice(0, 80)} ${part.scrollWidth} in ${part.clientWidth}`)",
        parts,
    )
    return found


class Page:
    """The page of one server.

    tab: the one that generates, "txt2img" or "img2img"; errors: what the page's scripts have raised.
    """

    def __init__(self, browser: BrowserContext, url: str, tab: str = "txt2img") -> None:
        self.tab = tab
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
        self._page.wait_for_function("typeof executedOnLoaded !== 'undefined' && executedOnLoaded")

    def open_settings(self) -> Locator:
        """Bring our section of the settings to the front."""
        self._page.get_by_role("tab", name="Settings", exact=True).click()
        self._page.locator("#settings > .tab-nav > button", has_text="Precision LoRA").click()
        section = self._page.locator("#settings_precision_lora")
        section.wait_for()
        return section

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until the page has done what was asked of it."""
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while not condition():
            assert time.monotonic() < deadline, "the page did not come to this state"
            self._page.wait_for_timeout(50)

    def apply_settings(self) -> None:
        self._page.locator("#settings_submit").click()
        self._page.locator("#settings_result", has_text="settings changed").wait_for()

    def generate(self, prompt: str) -> str:
        """Press Generate and wait for the image; a prompt that this page has not had yet.

        Returns the messages under the image.
        """
        self.start(prompt)
        return self.wait_for_image(prompt)

    def start(self, prompt: str) -> None:
        self.open_tab()
        self._page.locator(f"#{self.tab}_prompt textarea").fill(prompt)
        self._page.locator(f"#{self.tab}_generate").click()

    def wait_for_image(self, prompt: str) -> str:
        """Of this prompt; returns the messages under it."""
        self._page.locator(f"#html_info_{self.tab}", has_text=prompt).wait_for()
        self._page.locator(f"#{self.tab}_gallery img").first.wait_for()
        self._page.locator(f"#{self.tab}_skip").wait_for(state="hidden")
        messages = self._page.locator(f"#html_log_{self.tab} .comments")
        return messages.inner_text() if messages.count() else ""

    def save(self, what: str, filename: str, fails: bool = False) -> str:
        """Press "Save UNet" or "Save Checkpoint" and wait for the end; what the page then says.

        fails: whether the end is an error. Forge shows it in a corner; Neo below its buttons, which lie in an
        accordion.
        """
        self._page.get_by_role("tab", name="Checkpoint Merger", exact=True).click()
        name = (
            self._page.locator("#tab_modelmerger, #tab_modelmerger_interface").get_by_label("Filename").first
        )
        if not name.is_visible():
            self._page.get_by_text("Save Current Model").click()
        name.fill(filename)
        self._page.get_by_role("button", name=re.compile(f"^Save {what}\\b")).click()
        toasts = self._page.locator(".toast-body")
        end = self._page.get_by_text(
            re.compile(
                "Nothing was saved"
                if fails
                else f"^({what} saved to|Saved {what} at:).*{re.escape(filename)}",
                re.I,
            )
        )
        end.first.wait_for()
        messages = [*toasts.all_inner_texts(), *(end.all_inner_texts() if fails else [])]
        self._page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
        toasts.first.wait_for(state="hidden")
        return "\n".join(messages)

    def press(self, button: str) -> None:
        """button: the last part of its name in the page ("interrupt", "skip", "send_to_img2img")."""
        self._page.locator(f"#{self.tab}_{button}").click()

    def open_tab(self) -> None:
        """The outer tab comes first: img2img has an inner one of its name."""
        self._page.get_by_role("tab", name=re.compile(f"^{self.tab}$", re.IGNORECASE)).first.click()

    def set_steps(self, steps: int) -> None:
        number = self._page.locator(f"#{self.tab}_steps input[type=number]")
        number.fill(str(steps))
        number.press("Tab")

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
