"""An override of one generation, the whole way through a running Forge and its API.

The checkpoint's weights are values of float8 e4m3, so that Forge's other eight-bit type shows in the image.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forge.checkpoint import make_checkpoint, make_lora, save_lora
from tests.forge.real_forge import HOW_TO_RUN
from tests.forge.webui import Generation, ServerError, WebUI

COARSE = "float8-e5m2"
OVERRIDE = {"override_settings": {"forge_unet_storage_dtype": COARSE}}
PROMPT = "a cat <lora:strong:1>"
LOADED = "Loading Model: "
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "hr_upscaler": "Latent",
    "hr_second_pass_steps": 2,
    "hr_cfg": 1,
    "denoising_strength": 0.8,
    "hr_additional_modules": ["Use same choices"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two checkpoints with the same content, a LoRA, and what the server writes; removed at the end, for
    pytest would keep it."""
    root = os.environ.get("FORGE_ROOT")
    if not root:
        pytest.skip(HOW_TO_RUN)
    folder = tmp_path_factory.mktemp("override")
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    make_checkpoint(Path(root).resolve(), checkpoint)
    checkpoint.with_name("twin.safetensors").hardlink_to(checkpoint)
    save_lora(folder / "models/Lora/strong.safetensors", make_lora(checkpoint, rank=8, seed=1))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def webui(data: Path) -> Iterator[WebUI]:
    root = Path(os.environ["FORGE_ROOT"]).resolve()
    with WebUI(root, data / "webui", data / "models", extension=True) as server:
        server.wait_until_ready()
        server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield server


@pytest.fixture(scope="module")
def base(webui: WebUI) -> Generation:
    return webui.generate(PROMPT)


@pytest.fixture
def config(data: Path, base: Generation) -> Iterator[Path]:
    """The user's settings on disk: the same bytes after the test."""
    file = data / "webui/config.json"
    before = file.read_bytes()
    yield file
    assert file.read_bytes() == before


def loads(webui: WebUI, position: int) -> list[tuple[str, bool]]:
    """Checkpoints that were loaded since then, and whether in the coarse type."""
    lines = [line for line in webui.log(position).splitlines() if line.startswith(LOADED)]
    return [("twin" if "twin.safetensors" in line else "small", "float8_e5m2" in line) for line in lines]


def test_the_apis_storage_type_makes_the_image_of_the_setting_and_ends_with_it(
    webui: WebUI, base: Generation, config: Path
) -> None:
    position = webui.log_position()
    coarse = webui.generate(PROMPT, **OVERRIDE)
    assert not coarse.same_pixels(base)
    assert webui.generate(PROMPT, **OVERRIDE).same_pixels(coarse)
    assert loads(webui, position) == [("small", True)]
    assert webui.generate(PROMPT).same_pixels(base)
    assert loads(webui, position) == [("small", True), ("small", False)]
    assert webui.get("options")["forge_unet_storage_dtype"] == "Automatic"


def test_it_is_what_the_setting_makes(webui: WebUI, base: Generation) -> None:
    with webui.stored_as(COARSE):
        expected = webui.generate(PROMPT)
        back = webui.generate(PROMPT, override_settings={"forge_unet_storage_dtype": "Automatic"})
    assert webui.generate(PROMPT, **OVERRIDE).same_pixels(expected)
    assert back.same_pixels(base)
    assert webui.generate(PROMPT).same_pixels(base)


def test_hires_fix_with_another_checkpoint_is_stored_alike_and_takes_nothing_along(
    webui: WebUI, base: Generation, config: Path
) -> None:
    plain = webui.generate(PROMPT, **HIRES, hr_checkpoint_name="twin.safetensors")
    webui.generate(PROMPT)
    position = webui.log_position()
    image = webui.generate(PROMPT, **HIRES, **OVERRIDE, hr_checkpoint_name="twin.safetensors", n_iter=2)
    assert loads(webui, position) == [("small", True), ("twin", True)] * 2
    assert not image.same_pixels(plain)
    assert webui.generate(PROMPT).same_pixels(base)


def test_the_refiner_is_stored_alike_and_takes_nothing_along(
    webui: WebUI, base: Generation, config: Path
) -> None:
    position = webui.log_position()
    refined = webui.generate(
        PROMPT, **OVERRIDE, refiner_checkpoint="twin.safetensors", refiner_switch_at=0.5, steps=4
    )
    assert loads(webui, position) == [("small", True), ("twin", True)]
    assert "Refiner: twin" in refined.infotext
    assert webui.generate(PROMPT).same_pixels(base)


def test_an_error_in_the_generation_ends_it(webui: WebUI, base: Generation, config: Path) -> None:
    position = webui.log_position()
    with pytest.raises(ServerError, match="Could not find checkpoint with name nowhere"):
        webui.generate(PROMPT, **HIRES, **OVERRIDE, hr_checkpoint_name="nowhere")
    assert loads(webui, position) == [("small", True)]
    assert webui.generate(PROMPT).same_pixels(base)


@pytest.mark.parametrize("name", ["float7", "bnb-nf4"])
def test_what_cannot_be_is_said_and_the_image_is_that_of_the_setting(
    webui: WebUI, base: Generation, config: Path, name: str
) -> None:
    """This Forge has no float7, and no card that quantizes to NF4."""
    position = webui.log_position()
    image = webui.generate(PROMPT, override_settings={"forge_unet_storage_dtype": name})
    assert image.same_pixels(base)
    assert loads(webui, position) == []
    said = [
        line for line in webui.log(position).splitlines() if line.startswith("[Precision LoRA] Diffusion")
    ]
    assert len(said) == 1
    assert name in said[0]
