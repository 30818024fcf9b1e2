"""A running Forge that is given files whose code would run, and strengths that are no numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containers.hostile import RUNNING, marker_of
from tests.running.checkpoint import make_checkpoint, make_lora, save_lora
from tests.running.webui import Generation, ServerError, WebUI

COMMANDS = ("a command", "a command in the older form", "a plain pickle")
ROUTES = ("/precision-lora/v1/inspect?lora={}", "/precision-lora/v1/plan?lora={}&card=8GiB")
STRENGTHS = ("1e39", "-1e300", "nan", "inf", "-inf", "abc", "1e39:0.5", "te=nan:unet=1")


@pytest.fixture(scope="module")
def loras(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    checkpoint = folder / "Stable-diffusion/small.safetensors"
    make_checkpoint(host_root, checkpoint)
    save_lora(folder / "Lora/good.safetensors", make_lora(checkpoint, rank=4, seed=1))
    for number, name in enumerate(COMMANDS):
        RUNNING[name][0](folder / f"Lora/code{number}.pt")
    yield folder / "Lora"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def webui(
    start: Callable[..., WebUI], loras: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[WebUI]:
    data = tmp_path_factory.mktemp("server") / "data"
    with start(data, loras.parent, extension=True) as webui:
        webui.wait_until_ready()
        yield webui


@pytest.fixture(scope="module")
def good(webui: WebUI) -> Generation:
    return webui.generate("a cat <lora:good:1>")


@pytest.fixture
def code(loras: Path, number: int) -> Iterator[str]:
    """The name of a file with code in it; nothing of it, nor beside it, may change."""
    path = loras / f"code{number}.pt"
    before = path.read_bytes(), path.stat().st_mtime_ns, sorted(loras.iterdir())
    yield path.stem
    assert (path.read_bytes(), path.stat().st_mtime_ns, sorted(loras.iterdir())) == before
    assert not marker_of(path).exists(), "its code ran"


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_code_does_not_run_by_a_prompt(webui: WebUI, good: Generation, loras: Path, code: str) -> None:
    position = webui.log_position()
    image = webui.generate(f"a cat <lora:{code}:1><lora:good:1>")
    assert image.same_pixels(good)
    assert f"Precision LoRA skipped: {code}" in image.infotext
    (line,) = [line for line in webui.log(position).splitlines() if "left out" in line]
    assert "more than weights" in line
    assert str(loras) not in line


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_code_does_not_run_by_a_route(webui: WebUI, loras: Path, code: str, route: str) -> None:
    with pytest.raises(ServerError, match=r"422.*nothing is read here") as caught:
        webui.get(route.format(code))
    assert str(loras) not in str(caught.value)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_strength_that_is_no_number_gives_an_image_and_a_notice(
    webui: WebUI, good: Generation, strength: str
) -> None:
    base = webui.generate("a cat")
    position = webui.log_position()
    image = webui.generate(f"a cat <lora:good:{strength}>")
    assert image.same_pixels(base)
    assert "Precision LoRA skipped: good" in image.infotext
    assert sum("LoRA good was left out" in line for line in webui.log(position).splitlines()) == 1
    (file,) = webui.status()["last_generation"]["files"]
    assert (file["name"], bool(file["problem"])) == ("good", True)
    assert webui.generate("a cat <lora:good:1>").same_pixels(good)
