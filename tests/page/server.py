"""`python -m tests.page.server FOLDER`: the page, over the double, in a process of its own.

Its address stands in `FOLDER/address` once it listens. Beside the page: `GET /state`, what is set and what
was seen in the host; `POST /reset`, everything as it was at the start.
"""

from __future__ import annotations

import html
import importlib.util
import json
import socket
import sys
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from lib_precision_lora.host.page.settings import read_settings
from tests.host.jobs import start_jobs
from tests.host.lora_files import make_lora
from tests.host.webui import running_host
from tests.page.blocks import ROOT, build_page
from tests.page.generating import PageJobs, flat
from tests.page.host_page import page_modules

CATS, DOGS = make_lora("cats", seed=1), make_lora("dogs", seed=2, rank=3)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    (lora_dir := folder / "Lora").mkdir()
    with running_host("double", folder, lora_dir) as host, pytest.MonkeyPatch.context() as patch:
        for lora in (CATS, DOGS):
            lora.write(host)
        modules = page_modules()
        sys.modules.update(modules)
        extension = load_extension()
        for register in modules["modules.script_callbacks"].registered["before_ui"]:
            register()
        jobs = start_jobs(host, folder, patch, make=lambda *found: PageJobs(*found, loras=[CATS, DOGS]))
        jobs.run()
        scripts = {tab: tab_script(extension, tab) for tab in ("txt2img", "img2img")}
        on_paste = modules["modules.script_callbacks"].registered["infotext_pasted"]
        serve(make_app(jobs, scripts, on_paste), folder / "address")


def load_extension() -> Any:
    """The extension's entry point, as the WebUI imports it."""
    spec = importlib.util.spec_from_file_location("precision_lora", ROOT / "scripts/precision_lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tab_script(extension: Any, tab: str) -> Any:
    script = extension.PrecisionLoRA()
    script.is_img2img = tab == "img2img"
    return script


def make_app(jobs: PageJobs, scripts: dict[str, Any], on_paste: list[Any]) -> FastAPI:
    """The page, and beside it what tests ask for."""
    shared = jobs.host.shared
    initial = dict(shared.opts.data)

    def generate(tab: str, values: tuple[Any, ...]) -> tuple[str, str]:
        task, prompt, *controls = values
        p, processed = jobs.generate(task, prompt, scripts[tab], tuple(controls))
        parameters = {"Prompt": prompt, **p.extra_generation_params}
        infotext = ", ".join(f"{name}: {value}" for name, value in parameters.items())
        return html.escape(infotext), html.escape(processed.comments)

    def paste(parameters: str) -> None:
        for callback in on_paste:
            callback("", json.loads(parameters))

    app = FastAPI()

    @app.get("/state")
    def state() -> dict[str, Any]:
        return {
            "settings": flat(read_settings(shared.opts)),
            "saved": json.loads(Path(shared.config_filename).read_text()),
            "loads": [[file, str(storage)] for file, storage in jobs.loads],
            "seen": jobs.seen,
        }

    @app.post("/reset")
    def reset() -> None:
        shared.opts.data.clear()
        shared.opts.data.update(initial)
        shared.opts.save(shared.config_filename)
        jobs.run()
        jobs.loads.clear()
        jobs.seen.clear()

    return gr.mount_gradio_app(app, build_page(scripts, shared, generate, paste), path="/")


def serve(app: FastAPI, address: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        complete = address.with_name("address.part")
        complete.write_text(f"http://127.0.0.1:{listening.getsockname()[1]}")
        complete.rename(address)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
