"""The accordion "Precision LoRA" in Forge's page, as far as the tests click through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.running.page import Page, overflowing

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Route

NARROW = 400
"""Pixels; a telephone."""


class PanelPage(Page):
    """txt2img or img2img, with the accordion."""

    @property
    def accordion(self) -> Locator:
        return self._page.locator(f"#precision_lora_{self.tab}")

    @property
    def applied(self) -> Locator:
        return self._page.locator(f"#precision_lora_{self.tab}_applied")

    @property
    def infotext(self) -> str:
        return self._page.locator(f"#html_info_{self.tab}").inner_text()

    @property
    def enabled(self) -> bool:
        return self.accordion.locator(".input-accordion-checkbox").is_checked()

    def toggle(self) -> None:
        """Open the accordion, or close it; the checkbox follows."""
        self.accordion.locator(".label-wrap").first.click()

    def choose(self, control: str, value: str) -> None:
        """control: the last part of its name in the page ("low_bits", "compute", "patcher")."""
        self.accordion.locator(f"#precision_lora_{self.tab}_{control} input").click()
        self._page.get_by_role("option", name=value, exact=True).click()

    def choice(self, control: str) -> str:
        return self.accordion.locator(f"#precision_lora_{self.tab}_{control} input").input_value()

    def wait_for_applied(self, text: str) -> str:
        """Until what was applied says so, opened; returns all of it."""
        summary = self.applied.locator("details").first.locator("summary").first
        summary.wait_for()
        if self.applied.locator("details[open]").count() == 0:
            summary.click()
        self.applied.locator("details").first.filter(has_text=text).wait_for()
        return self.applied.inner_text()

    def upload(self, png: bytes) -> None:
        """Into img2img, as the image to begin with."""
        self.open_tab()
        image = {"name": "image.png", "mimeType": "image/png", "buffer": png}
        self._page.locator("#img2img_image input[type=file]").set_input_files([image])
        self._page.wait_for_function(
            "[...document.querySelectorAll('.logical_image_background textarea')]"
            ".some(image => image.value.startsWith('data:image/png'))"
        )

    def send_as_another_version(self, value: str, other: str) -> None:
        """From now on, each value of this name leaves the page as the other: a page that is open since before
        an update sends what that version had."""

        def replace(route: Route) -> None:
            sent = route.request.post_data or ""
            route.continue_(post_data=sent.replace(f'"{value}"', f'"{other}"'))

        self._page.route("**/queue/join*", replace)

    def send_from_png_info(self, png: bytes) -> None:
        """Drop an image into PNG Info, and press "Send to txt2img"."""
        self._page.get_by_role("tab", name="PNG Info", exact=True).click()
        tab = self._page.locator("#tab_pnginfo")
        if tab.get_by_label("Remove Image").count():
            tab.get_by_label("Remove Image").click()
        image = {"name": "image.png", "mimeType": "image/png", "buffer": png}
        tab.locator("input[type=file]").first.set_input_files([image])
        tab.locator("#tab_pnginfo, .gradio-html", has_text="Steps:").first.wait_for()
        tab.locator("#txt2img_tab").click()
        self.accordion.wait_for()

    @property
    def warnings(self) -> Locator:
        return self._page.locator(".toast-wrap")

    def overflowing(self) -> list[str]:
        """What of ours is wider than its place, or reaches out of the window."""
        panel = f"#precision_lora_{self.tab}"
        return self.overflowing_parts(f"{panel}, {panel}_applied, {panel}_applied *")

    def overflowing_parts(self, parts: str) -> list[str]:
        """parts: a selector."""
        return overflowing(self._page, parts)

    def reopen(self, theme: str, width: int) -> None:
        """As somebody sees it who comes with this theme, on a screen of this width."""
        self._page.set_viewport_size({"width": width, "height": 1280})
        self._page.goto(f"{self._page.url.partition('?')[0]}?__theme={theme}", wait_until="domcontentloaded")
        self.wait_until_ready()

    def pictured(self, name: str) -> None:
        """The accordion and what stands under it."""
        group = self.accordion.locator("xpath=ancestor::*[descendant::*[contains(@id, '_applied')]][1]")
        group.scroll_into_view_if_needed()
        self.screenshot(name, group)
