"""An override of one generation, the whole way through a running WebUI and its API.

The checkpoint's weights are values of float8 e4m3, so that the other eight-bit type shows in the image.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lib_precision_lora.host.generation.infotext import LOW_BITS, MODE
from lib_precision_lora.host.page.xyz import LOW_BITS_AXIS, MODE_AXIS
from tests.running.plot import plot
from tests.running.webui import SMALL_IMAGE, Generation, ServerError, WebUI

COARSE, E5M2, E4M3 = "float8-e5m2", "float8_e5m2", "float8_e4m3fn"
OVERRIDE = {"override_settings": {"forge_unet_storage_dtype": COARSE}}
PROMPT = "a cat <lora:strong:1>"
LOADED = "Loading Model: "
ROUNDING, VISIBLE = 2, 20
"""Grey levels: what a batch's other order of sums may make, and what another storage type makes at least."""

STORAGES, MODES = (COARSE, f"{COARSE} (fp16 LoRA)", "Automatic", "float8-e4m3fn"), ("Automatic", "fp16")
"""Of a plot; the second is stored as the first, so that three types are four names."""


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """With two checkpoints of the same content."""
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    checkpoint.with_name("twin.safetensors").hardlink_to(checkpoint)
    return folder


@pytest.fixture(scope="module")
def webui(
    start: Callable[..., WebUI], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUI]:
    """The host with the extension, and with a script that can fail."""
    scripts = tmp_path_factory.mktemp("failing") / "scripts"
    scripts.mkdir()
    shutil.copy(Path(__file__).with_name("failing_script.py"), scripts)
    others = {"failing": scripts.parent}
    with start(folder / "webui", folder / "models", extension=True, others=others) as server:
        server.wait_until_ready()
        server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield server


@pytest.fixture(scope="module")
def base(webui: WebUI) -> Generation:
    return webui.generate(PROMPT)


@pytest.fixture
def config(folder: Path, base: Generation) -> Iterator[Path]:
    """The user's settings on disk: the same bytes after the test."""
    file = folder / "webui/config.json"
    before = file.read_bytes()
    yield file
    assert file.read_bytes() == before


def loads(webui: WebUI, position: int) -> list[tuple[str, str | None]]:
    """Checkpoints that were loaded since then, and in which storage type; None: in the file's own."""
    lines = [line for line in webui.log(position).splitlines() if LOADED in line]
    return [("twin" if "twin.safetensors" in line else "small", storage_of(line)) for line in lines]


def written(image: Generation, name: str) -> str | None:
    """What an image's parameters say under this name."""
    found = re.search(f"{name}: ([^,\\n]+)", image.infotext)
    return found and found[1]


@contextmanager
def ended_midway(webui: WebUI, how: str, steps: int) -> Iterator[Callable[..., Future[list[Generation]]]]:
    """Starts a generation of this many steps, and after the second of them posts "interrupt" or "skip"."""
    with ThreadPoolExecutor(1) as threads:
        yield partial(threads.submit, webui.generate_all, steps=steps)
        webui.wait_for_step(2, steps)
        webui.post(how, {})


def storage_of(line: str) -> str | None:
    found = re.search(r"'unet_storage_dtype': torch\.(\w+)", line)
    return found and found[1]


def test_the_apis_storage_type_makes_the_image_of_the_setting_and_ends_with_it(
    webui: WebUI, base: Generation, config: Path
) -> None:
    position = webui.log_position()
    coarse = webui.generate(PROMPT, **OVERRIDE)
    assert not coarse.same_pixels(base)
    assert webui.generate(PROMPT, **OVERRIDE).same_pixels(coarse)
    assert loads(webui, position) == [("small", E5M2)]
    assert webui.generate(PROMPT).same_pixels(base)
    assert loads(webui, position) == [("small", E5M2), ("small", None)]
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
    plain = webui.generate(PROMPT, **webui.hires(), hr_checkpoint_name="twin.safetensors")
    webui.generate(PROMPT)
    position = webui.log_position()
    image = webui.generate(
        PROMPT, **webui.hires(), **OVERRIDE, hr_checkpoint_name="twin.safetensors", n_iter=2
    )
    assert loads(webui, position) == [("small", E5M2), ("twin", E5M2)] * 2
    assert not image.same_pixels(plain)
    assert webui.generate(PROMPT).same_pixels(base)


def test_the_refiner_is_stored_alike_and_takes_nothing_along(
    webui: WebUI, base: Generation, config: Path
) -> None:
    position = webui.log_position()
    refined = webui.generate(
        PROMPT, **OVERRIDE, refiner_checkpoint="twin.safetensors", refiner_switch_at=0.5, steps=4
    )
    assert loads(webui, position) == [("small", E5M2), ("twin", E5M2)]
    assert "Refiner: twin" in refined.infotext
    assert webui.generate(PROMPT).same_pixels(base)


def test_an_error_in_the_generation_ends_it(webui: WebUI, base: Generation, config: Path) -> None:
    position = webui.log_position()
    with pytest.raises(ServerError, match=r"Could not find checkpoint with name .*nowhere"):
        webui.generate(PROMPT, **webui.hires(), **OVERRIDE, hr_checkpoint_name="nowhere")
    assert loads(webui, position) == [("small", E5M2)]
    assert webui.generate(PROMPT).same_pixels(base)


def test_an_error_in_the_middle_of_sampling_ends_it(webui: WebUI, base: Generation, config: Path) -> None:
    position = webui.log_position()
    with pytest.raises(ServerError, match=r"500: .*it fails in the middle of sampling"):
        webui.generate(PROMPT, **OVERRIDE, alwayson_scripts={"Failing": {"args": [True]}})
    assert loads(webui, position) == [("small", E5M2)]
    assert webui.generate(PROMPT).same_pixels(base)


def test_an_interruption_ends_it(webui: WebUI, base: Generation, config: Path) -> None:
    position = webui.log_position()
    with ended_midway(webui, "interrupt", 1000) as started:
        generation = started(PROMPT, **OVERRIDE, n_iter=2)
    (image,) = generation.result()
    assert not image.same_pixels(base)
    assert "1000/1000" not in webui.log(position)
    assert loads(webui, position) == [("small", E5M2)]
    assert webui.status()["last_generation"]["finished"] is False
    assert webui.generate(PROMPT).same_pixels(base)
    assert webui.status()["last_generation"]["finished"] is True


def test_a_skipped_image_leaves_it_to_the_next_of_its_generation(
    webui: WebUI, base: Generation, config: Path
) -> None:
    steps, seed = 40, SMALL_IMAGE["seed"]
    first, second = (
        webui.generate(PROMPT, **OVERRIDE, steps=steps, seed=seed + number) for number in range(2)
    )
    with ended_midway(webui, "skip", steps) as started:
        generation = started(PROMPT, **OVERRIDE, n_iter=2)
    skipped, whole = generation.result()
    assert not skipped.same_pixels(first)
    assert whole.same_pixels(second)
    assert webui.generate(PROMPT).same_pixels(base)


def test_every_image_of_its_batches_has_it(webui: WebUI, base: Generation, config: Path) -> None:
    position = webui.log_position()
    images = webui.generate_all(PROMPT, **OVERRIDE, n_iter=3, batch_size=2)
    assert len(images) == 6
    for number, image in enumerate(images):
        alone = webui.generate(PROMPT, **OVERRIDE, seed=SMALL_IMAGE["seed"] + number)
        assert image.difference(alone) <= ROUNDING
    assert images[0].difference(base) > VISIBLE
    assert loads(webui, position) == [("small", E5M2)]
    assert webui.generate(PROMPT).same_pixels(base)


def test_img2img_has_it_alike(webui: WebUI, base: Generation, config: Path) -> None:
    start = {"init_images": [base64.b64encode(base.png).decode()], "denoising_strength": 0.7, "steps": 4}
    plain = webui.generate(PROMPT, **start)
    position = webui.log_position()
    assert webui.generate(PROMPT, **start, **OVERRIDE).difference(plain) > ROUNDING
    assert webui.generate(PROMPT, **start).same_pixels(plain)
    assert loads(webui, position) == [("small", E5M2), ("small", None)]


def test_clients_at_once_get_each_what_they_ask_for(webui: WebUI, base: Generation, config: Path) -> None:
    coarse = webui.generate(PROMPT, **OVERRIDE)

    def client(parameters: dict[str, Any]) -> list[Generation]:
        return [webui.generate(PROMPT, **parameters) for _ in range(4)]

    position = webui.log_position()
    with ThreadPoolExecutor(2) as threads:
        plain, overridden = threads.map(client, ({}, OVERRIDE))
    assert [image.same_pixels(base) for image in plain] == [True] * 4
    assert [image.same_pixels(coarse) for image in overridden] == [True] * 4
    assert len(loads(webui, position)) > 2, "they did not come in turn"
    assert webui.generate(PROMPT).same_pixels(base)


@pytest.fixture(scope="module")
def singles(webui: WebUI) -> dict[tuple[str, str], Generation]:
    """An image by each choice of storage and mode, made by itself."""
    return {
        (storage, mode): webui.generate(
            PROMPT, alwayson_scripts={"Precision LoRA": {"args": [True, storage, mode]}}
        )
        for storage in STORAGES
        for mode in MODES
    }


@pytest.mark.parametrize("outer", ["x", "y", "z"])
def test_a_plot_loads_each_storage_type_once_wherever_its_axis_is_and_each_cell_is_that_of_its_choices(
    webui: WebUI, base: Generation, config: Path, singles: dict[tuple[str, str], Generation], outer: str
) -> None:
    axes = [(MODE_AXIS, MODES), ("Seed", [str(SMALL_IMAGE["seed"])])]
    axes.insert("xyz".index(outer), (LOW_BITS_AXIS, STORAGES))
    assert webui.generate(PROMPT).same_pixels(base)
    position = webui.log_position()
    cells = plot(webui, PROMPT, *axes)
    assert loads(webui, position) == [("small", E5M2), ("small", None), ("small", E4M3)]
    made = {(written(cell, LOW_BITS), written(cell, MODE) or MODES[0]): cell for cell in cells}
    assert len(cells) == len(made) == len(singles)
    assert all(made[choices].same_pixels(single) for choices, single in singles.items())
    assert webui.generate(PROMPT).same_pixels(base)
    assert loads(webui, position)[3:] == [("small", None)]


@pytest.mark.parametrize("name", ["float7", "bnb-nf4"])
def test_what_cannot_be_is_said_and_the_image_is_that_of_the_setting(
    webui: WebUI, base: Generation, config: Path, name: str
) -> None:
    """This host has no float7, and no card that quantizes to NF4."""
    position = webui.log_position()
    image = webui.generate(PROMPT, override_settings={"forge_unet_storage_dtype": name})
    assert image.same_pixels(base)
    assert loads(webui, position) == []
    said = [
        line for line in webui.log(position).splitlines() if line.startswith("[Precision LoRA] Diffusion")
    ]
    assert len(said) == 1
    assert name in said[0]
