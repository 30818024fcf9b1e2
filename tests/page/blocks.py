"""A plain page of gradio with the extension's parts mounted where the WebUI puts them."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

ROOT = Path(__file__).resolve().parents[2]


def build_page(
    scripts: dict[str, Any],
    shared: Any,
    generate: Callable[[str, tuple[Any, ...]], tuple[str, str]],
    paste: Callable[[str], None],
) -> gr.Blocks:
    """scripts: the extension's, by tab; generate: from a tab's script and the values of its task, prompt and
    controls to the image's parameters and the messages under it; paste: told the parameters of an image, as
    JSON."""
    theme = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    with gr.Blocks(analytics_enabled=False, head=head(), theme=theme) as page, gr.Tabs():
        for tab, script in scripts.items():
            with gr.Tab(tab.capitalize()):
                _build_tab(tab, script, generate)
        with gr.Tab("Settings"):
            _build_settings(page, shared)
        with gr.Tab("Paste"):
            parameters, button = gr.Textbox(elem_id="pasted"), gr.Button("Paste", elem_id="paste")
            button.click(paste, inputs=[parameters]).then(None, js="() => answered()")
    return page


def head() -> str:
    """The extension's JavaScript and style sheet after the WebUI's own, as the WebUI's page has them."""
    translations = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((ROOT / "localizations").glob("*.json"))
    }
    scripts = [Path(__file__).with_name("webui.js"), *sorted((ROOT / "javascript").glob("*.js"))]
    parts = [f"const translations = {json.dumps(translations)};", *(file.read_text() for file in scripts)]
    style = (ROOT / "style.css").read_text()
    hidden = "#txt2img_skip, #img2img_skip { display: none; }"
    return "".join(f"<script>{part}</script>" for part in parts) + f"<style>{hidden} {style}</style>"


def _build_tab(tab: str, script: Any, generate: Callable[..., tuple[str, str]]) -> None:
    task = gr.Textbox("", visible=False)
    prompt = gr.Textbox("", label="Prompt", elem_id=f"{tab}_prompt")
    with gr.Row():
        button = gr.Button("Generate", elem_id=f"{tab}_generate")
        gr.Button("Skip", elem_id=f"{tab}_skip")
    controls = script.ui(script.is_img2img)
    infotext, messages = gr.HTML(elem_id=f"html_info_{tab}"), gr.HTML(elem_id=f"html_log_{tab}")
    button.click(
        lambda *values: generate(tab, values),
        inputs=[task, prompt, *controls],
        outputs=[infotext, messages],
        js=f"(...values) => submit('{tab}', values)",
    ).then(None, js=f"() => finished('{tab}')")


def _build_settings(page: gr.Blocks, shared: Any) -> None:
    """A component for each option, as the WebUI makes it; "Apply settings" sets them and saves the file."""
    opts, components = shared.opts, {}
    button, result = (
        gr.Button("Apply settings", elem_id="settings_submit"),
        gr.HTML(elem_id="settings_result"),
    )
    with gr.Column(elem_id="settings_precision_lora"):
        for key, info in opts.data_labels.items():
            if info.section is None:
                continue
            usual = {bool: gr.Checkbox, int: gr.Number, str: gr.Textbox}
            component = info.component or usual[type(info.default)]
            components[key] = component(
                label=info.label, value=info.default, elem_id=f"setting_{key}", **(info.component_args or {})
            )
            gr.HTML(info.comment_after)

    def apply(*values: Any) -> str:
        changed = [key for key, value in zip(components, values, strict=True) if opts.set(key, value)]
        opts.save(shared.config_filename)
        return html.escape(f"{len(changed)} settings changed: {', '.join(changed)}.")

    button.click(apply, inputs=[*components.values()], outputs=[result]).then(None, js="() => answered()")
    page.load(lambda: [getattr(opts, key) for key in components], outputs=[*components.values()])
