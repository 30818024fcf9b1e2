"""A server of Forge in a process of its own, with a data folder of its own, and a client for it."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import psutil
from PIL import Image

from lib_precision_lora.ui.settings import OPTIONS

if TYPE_CHECKING:
    from typing_extensions import Self

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 300
ANSWER_SECONDS = 300
FLAGS = (
    "--always-cpu",
    "--skip-torch-cuda-test",
    "--skip-prepare-environment",
    "--skip-python-version-check",
    "--skip-version-check",
    "--no-download-sd-model",
    "--do-not-download-clip",
    "--api",
    "--server-name=127.0.0.1",
)
SETTINGS = {"live_previews_enable": False, "forge_preset": "all"}
"""No previews (their decoder would be downloaded), and all of Forge's own controls on the page."""

SMALL_IMAGE = {
    "seed": 7,
    "steps": 2,
    "width": 64,
    "height": 64,
    "cfg_scale": 1,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}
PAGE_DEFAULTS = {
    name.replace("TAB", tab): SMALL_IMAGE[value]
    for tab in ("txt2img", "img2img")
    for name, value in (
        ("customscript/seed.py/TAB/Seed/value", "seed"),
        ("customscript/sampler.py/TAB/Sampling steps/value", "steps"),
        ("customscript/sampler.py/TAB/Sampling method/value", "sampler_name"),
        ("customscript/sampler.py/TAB/Schedule type/value", "scheduler"),
        ("TAB/Width/value", "width"),
        ("TAB/Height/value", "height"),
        ("TAB/CFG Scale/value", "cfg_scale"),
    )
}
"""The same image for the API and for the page."""


class ServerError(RuntimeError):
    """The server answered with an error: its status and message."""


HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 2,
    "hr_cfg": 1,
    "denoising_strength": 0.8,
    "hr_additional_modules": ["Use same choices"],
}
"""Options of the API for a second, larger pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """One finished image. png: the file as sent; pixels: [height, width, 3], uint8."""

    png: bytes
    pixels: np.ndarray
    infotext: str

    def difference(self, other: Generation) -> int:
        """The largest difference of two images, in grey levels (0 to 255)."""
        return int(np.abs(self.pixels.astype(int) - other.pixels.astype(int)).max())

    def same_pixels(self, other: Generation) -> bool:
        return np.array_equal(self.pixels, other.pixels)


class WebUI:
    """A server that starts when it is made, and ends with its `with` block.

    root: the Forge to run; data: a new folder for all that it writes; models: what takes the place of its
    models folder; extension: whether Precision LoRA is there, as a link to this repository; credentials:
    "user:password" that its API asks for, which this client gives; others: further extensions, by name;
    page_defaults: what the page begins with, beside `PAGE_DEFAULTS`.

    flags: of the command line; moved: how lines of the log begin that tell of a model that was placed;
    card: the script that simulates one. Another host has others.
    """

    flags: Sequence[str] = FLAGS
    moved: tuple[str, ...] = ("Moving model(s)", "All loaded to GPU", "Loading Model")
    card = "simulated_card.py"

    def __init__(
        self,
        root: Path,
        data: Path,
        models: Path,
        extension: bool,
        credentials: str | None = None,
        others: Mapping[str, Path] = MappingProxyType({}),
        page_defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        (data / "extensions").mkdir(parents=True)
        if extension:
            (data / "extensions/precision-lora").symlink_to(REPOSITORY, target_is_directory=True)
        for name, folder in others.items():
            (data / "extensions" / name).symlink_to(folder, target_is_directory=True)
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._models = models
        self._log = data / "server.log"
        self._config = data / "config.json"
        self._config.write_text(json.dumps({**SETTINGS, **self.first_settings(root)}))
        (data / "ui-config.json").write_text(json.dumps({**PAGE_DEFAULTS, **page_defaults}))
        self._opener = build_opener(ProxyHandler({}))
        arguments = [*self.flags, "--port", self.url.rpartition(":")[2], "--data-dir", str(data)]
        self._headers = {}
        if credentials is not None:
            arguments += [f"--api-auth={credentials}"]
            self._headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
        arguments += [*self.models_from(data, models), "--gradio-allowed-path", str(root)]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        places = {"HF_HOME": str(data / "huggingface"), "GRADIO_TEMP_DIR": str(data / "gradio")}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "launch.py", *arguments],
                cwd=root,
                env={**os.environ, "COMMANDLINE_ARGS": "", "NO_PROXY": "127.0.0.1", **offline, **places},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def first_settings(self, root: Path) -> dict[str, Any]:
        """What else the host's settings must say, or it would ask."""
        return {}

    def models_from(self, data: Path, models: Path) -> list[str]:
        """Arguments of the command line by which the host finds its models in this folder."""
        return ["--models-dir", str(models)]

    def hires(self) -> dict[str, Any]:
        """Options of the API for a second, larger pass."""
        return dict(HIRES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until_ready(self) -> None:
        """Until the log says that everything is there, and the API answers.

        Its routes answer before the scripts' arguments are known, so an answer alone is not enough.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if "Startup time:" in self.log():
                try:
                    self.get("sd-models")
                except (URLError, ServerError):
                    pass
                else:
                    return
            try:
                status = self._process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
            raise AssertionError(f"the server ended with status {status}:\n{self.log()[-4000:]}")
        raise AssertionError(f"no answer within {START_SECONDS} s:\n{self.log()[-4000:]}")

    def log(self, position: int = 0) -> str:
        """What the server has written since a `position` taken before, in characters."""
        return self._log.read_text(errors="replace")[position:]

    def log_position(self) -> int:
        return len(self.log())

    def resident_bytes(self) -> int:
        """What the server's process has in RAM."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def get(self, path: str) -> Any:
        """From the WebUI's own API, or from this path of the server where it begins with a slash."""
        place = path if path.startswith("/") else f"/sdapi/v1/{path}"
        return self._request(Request(self.url + place, headers=self._headers))

    def post(self, path: str, values: Mapping[str, Any]) -> Any:
        body = json.dumps(values).encode()
        return self._request(
            Request(
                f"{self.url}/sdapi/v1/{path}", body, {"Content-Type": "application/json", **self._headers}
            )
        )

    def status(self) -> dict[str, Any]:
        """What the extension says of itself."""
        answer: dict[str, Any] = self.get("/precision-lora/v1/status")
        return answer

    def generate(self, prompt: str, **parameters: Any) -> Generation:
        """One image, as `generate_all` makes it."""
        return self.generate_all(prompt, **parameters)[0]

    def generate_all(self, prompt: str, **parameters: Any) -> list[Generation]:
        """txt2img, or img2img where `init_images` are given, by default of a small image that is always made
        from the same noise; a grid of them is none of these."""
        kind = "img2img" if "init_images" in parameters else "txt2img"
        answer = self.post(kind, {**SMALL_IMAGE, "prompt": prompt, **parameters})
        made = []
        for sent in answer["images"]:
            png = base64.b64decode(sent)
            with Image.open(io.BytesIO(png)) as image:
                infotext = str(image.info.get("parameters", ""))
                made.append(Generation(png, np.asarray(image.convert("RGB")), infotext))
        return [image for image in made if image.infotext]

    def wait_for_step(self, step: int, steps: int) -> None:
        """Until the generation that runs, of this many sampling steps, has taken this one."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            state = self.get("progress?skip_current_image=true")["state"]
            if state["sampling_steps"] == steps and state["sampling_step"] >= step:
                return
            time.sleep(0.02)  # between two questions; not for anything to happen
        raise AssertionError(f"no step {step} of {steps} within {ANSWER_SECONDS} s")

    def settings(self) -> dict[str, Any]:
        """All settings; the API tells those of Forge only, its file those of extensions as well."""
        defaults = {option.key: option.default for option in OPTIONS}
        return {**defaults, **self.get("options"), **json.loads(self._config.read_text())}

    @contextmanager
    def options(self, **values: Any) -> Iterator[None]:
        """These settings, then the present ones again."""
        before = self.settings()
        try:
            self.post("options", values)
            yield
        finally:
            self.post("options", {name: before[name] for name in values})

    @contextmanager
    def stored_as(self, storage: str) -> Iterator[None]:
        """The checkpoint with another "Diffusion in Low Bits", then as it is now.

        Forge loads the checkpoint anew only if the same request changes something about memory, too.
        """
        before = self.settings()
        memory = before["forge_inference_memory"]
        self.post("options", {"forge_unet_storage_dtype": storage, "forge_inference_memory": memory + 1})
        try:
            yield
        finally:
            back = {"forge_unet_storage_dtype": before["forge_unet_storage_dtype"]}
            self.post("options", {**back, "forge_inference_memory": memory})

    def _request(self, request: Request) -> Any:
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise ServerError(f"{error.code}: {error.read().decode(errors='replace')}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
