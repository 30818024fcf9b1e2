"""The page in Chromium, as far as the tests click through it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.request import ProxyHandler, Request, build_opener

from tests.running.page import overflowing

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Locator

PATIENCE_MS = 60_000
"""How long one click may take to have its effect; seconds where nothing else runs."""

NARROW, WIDE = 400, 1280
"""Pixels; a telephone, and a desk."""


class Server:
    """What the page's server tells beside the page."""

    def __init__(self, url: str) -> None:
        self.url, self._opener = url, build_opener(ProxyHandler({}))

    @property
    def state(self) -> dict[str, Any]:
        with self._opener.open(f"{self.url}/state", timeout=PATIENCE_MS / 1000) as answer:
            state: dict[str, Any] = json.load(answer)
        return state

    @property
    def seen(self) -> dict[str, Any]:
        """What was found in the host in the middle of the last generation."""
        last: dict[str, Any] = self.state["seen"][-1]
        return last

    def reset(self) -> None:
        request = Request(f"{self.url}/reset", method="POST")
        self._opener.open(request, timeout=PATIENCE_MS / 1000).close()


class Page:
    """A page that was just opened, at the tab txt2img. errors: what its scripts have raised or logged."""

    def __init__(self, browser: BrowserContext, url: str) -> None:
        self.errors: list[str] = []
        self.page, self._url, self.tab = browser.new_page(), url, "txt2img"
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._logged)
        self.page.route(lambda address: not address.startswith(url), lambda route: route.abort())
        self.open()

    def _logged(self, message: Any) -> None:
        if message.type == "error" and message.location["url"].startswith(self._url):
            self.errors.append(message.text)

    def open(self, width: int = WIDE, **query: str) -> None:
        """As somebody sees it who comes with this address, on a screen of this width."""
        self.page.set_viewport_size({"width": width, "height": 1000})
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        self.page.goto(f"{self._url}/?{asked}", wait_until="domcontentloaded")
        self.page.locator("html[data-ui-loaded]").wait_for(state="attached")
        self.tab = "txt2img"

    def go_to(self, tab: str) -> None:
        self.page.get_by_role("tab", name=tab, exact=True).click()
        self.tab = tab.lower()

    def part(self, name: str = "") -> Locator:
        """Of the extension, in this tab: the accordion itself, or an element by the last part of its name."""
        return self.page.locator(f"#precision_lora_{self.tab}{name}")

    def switch(self, on: bool) -> None:
        """Open the accordion, or close it."""
        self.part("-checkbox").get_by_role("checkbox").set_checked(on)
        self.part("_low_bits").wait_for(state="visible" if on else "hidden")

    def choose(self, control: str, value: str) -> None:
        row = self.part(f"_{control}")
        row.locator("input").click()
        row.get_by_role("option", name=value, exact=True).click()

    def choices(self, control: str) -> list[str]:
        row = self.part(f"_{control}")
        row.locator("input").click()
        found: list[str] = row.get_by_role("option").all_inner_texts()
        self.page.keyboard.press("Escape")
        return [text.replace("✓", "").strip() for text in found]

    def generate(self, prompt: str) -> str:
        """Press "Generate", wait until it has ended; returns the image's parameters."""
        self.page.locator(f"#{self.tab}_prompt textarea").fill(prompt)
        self._press(f"{self.tab}_generate")
        return self.page.locator(f"#html_info_{self.tab}").inner_text()

    def paste(self, **parameters: str) -> list[str]:
        """The parameters of an image; returns what pops up then."""
        self.page.locator("#pasted textarea").fill(json.dumps(parameters))
        self._press("paste")
        shown = self.page.locator(".toast-body")
        shown.first.wait_for()
        texts: list[str] = shown.locator(".toast-text").all_inner_texts()
        return texts

    @property
    def messages(self) -> str:
        return self.page.locator(f"#html_log_{self.tab}").inner_text()

    def wait_for_applied(self, *texts: str) -> str:
        """Until what was applied says all of this, opened; returns it."""
        report = self.part("_applied").locator("details").first
        report.wait_for()
        if report.get_attribute("open") is None:
            report.locator("summary").first.click()
        for text in texts:
            report = report.filter(has_text=text)
        report.wait_for()
        return self.part("_applied").inner_text()

    def setting(self, key: str) -> Locator:
        return self.page.locator(f"#setting_{key}")

    def set(self, key: str, value: bool | int | str) -> None:
        row = self.setting(key)
        if isinstance(value, bool):
            row.get_by_role("checkbox").set_checked(value)
        elif isinstance(value, str):
            row.get_by_role("radio", name=value, exact=True).check()
        else:
            row.locator("input[type=number]").fill(str(value))
            row.locator("input[type=number]").press("Tab")

    def apply_settings(self) -> str:
        """Returns what the page says of it."""
        self._press("settings_submit")
        return self.page.locator("#settings_result").inner_text()

    def _press(self, button: str) -> None:
        """Until the server has answered."""
        answers = self.page.evaluate("Number(document.documentElement.dataset.answers || 0)")
        self.page.locator(f"#{button}").click()
        self.page.locator(f'html[data-answers="{answers + 1}"]').wait_for(state="attached")

    def texts(self, parts: str) -> set[str]:
        """All that stands in these parts of the page. parts: a selector."""
        found: list[str] = self.page.evaluate(
            "parts => [...document.querySelectorAll(parts)].flatMap(part => {"
            " const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT); const texts = [];"
            " while (walker.nextNode()) texts.push(walker.currentNode.textContent.trim());"
            " return texts })",
            parts,
        )
        return {text for text in found if text}

    def overflowing(self, parts: str) -> list[str]:
        return overflowing(self.page, parts)


def row(name: str, value: str) -> str:
    """A row of what was applied, as text: its name and its value are elements without a space between."""
    return f"{name}{value}"
