"""The whole way through a running WebUI that believes in a card, at three sizes of it.

What cards of 12, 6 and 2 GiB are for Flux is scaled to the small checkpoint: the first has room for
everything, the second for the checkpoint and a part of the LoRA's factors, the third not even for two layers
of them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors

from lib_precision_lora.ui.settings import BESIDE
from tests.running.checkpoint import UNET as UNET_PREFIX
from tests.running.checkpoint import make_checkpoint, make_lora, save_lora
from tests.running.webui import Generation, WebUI

MIB = 2**20
INFERENCE = 64 * MIB
PLENTY = 4096 * MIB
PLANNED = re.compile(
    r"LoRAs on (\w+): (\d+) MB planned \((\d+) MB of factors on the card, (\d+) MB streamed from RAM, "
    r"(\d+) MB workspace\); (\d+) MB of factors stand on the card"
)
CHECKPOINT = "Stable-diffusion/small.safetensors"
UNET = "IntegratedUNet2DConditionModel"
SKIPPED = "Precision LoRA skipped: "


@pytest.fixture(scope="module")
def models(host_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One checkpoint, a large LoRA and a small one; removed at the end."""
    folder = tmp_path_factory.mktemp("card-models")
    checkpoint = folder / CHECKPOINT
    make_checkpoint(host_root, checkpoint)
    save_lora(folder / "Lora/large.safetensors", make_lora(checkpoint, rank=128, seed=1))
    save_lora(folder / "Lora/little.safetensors", make_lora(checkpoint, rank=2, seed=2))
    yield folder
    shutil.rmtree(folder)


class Card:
    """The server's card; resizing it takes everything off it first."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "card.json"
        self.resize(PLENTY)

    def resize(self, total: int) -> None:
        self._file.write_text(json.dumps({"total": total, "inference": INFERENCE}))


@pytest.fixture(scope="module")
def server(
    host: tuple[type[WebUI], Path],
    start: Callable[..., WebUI],
    models: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[WebUI, Card]]:
    folder = tmp_path_factory.mktemp("card") / "scripts"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name(host[0].card), folder)
    card = Card(folder)
    data = tmp_path_factory.mktemp("card-server") / "data"
    with start(data, models, extension=True, others={"a-simulated-card": folder.parent}) as webui:
        webui.wait_until_ready()
        yield webui, card


def generate(webui: WebUI, prompt: str) -> tuple[Generation, str]:
    """An image, and what the log says meanwhile. All models leave the card first."""
    webui.post("unload-checkpoint", {})
    position = webui.log_position()
    image = webui.generate(prompt)
    return image, webui.log(position)


def planned(log: str) -> tuple[int, ...]:
    """MB planned, of factors on the card, streamed, of workspace; then those that stand on the card."""
    (found,) = [match.groups() for match in PLANNED.finditer(log) if match[1] == UNET]
    return tuple(int(number) for number in found[1:])


def unet_bytes(models: Path) -> int:
    """As a CPU computes with it, in fp32."""
    with safetensors.safe_open(models / CHECKPOINT, "pt") as file:
        names = [name for name in file.keys() if name.startswith(UNET_PREFIX)]  # noqa: SIM118
        return sum(4 * math.prod(file.get_slice(name).get_shape()) for name in names)


@pytest.fixture
def beside(server: tuple[WebUI, Card]) -> Iterator[None]:
    """No layer of the fp32 checkpoint is merged, so that its LoRAs are planned as on low-bit ones."""
    with server[0].options(precision_lora_dense=BESIDE):
        yield


@pytest.mark.usefixtures("beside")
def test_every_size_of_card_makes_the_same_image_or_says_why_not(
    server: tuple[WebUI, Card], models: Path
) -> None:
    webui, card = server
    base, log = generate(webui, "a cat")
    assert not PLANNED.search(log)
    model = unet_bytes(models) + MIB

    resident, log = generate(webui, "a cat <lora:large:1>")
    total, factors, streamed, workspace, standing = planned(log)
    whole = webui.status()["last_generation"]
    assert whole["streamed_bytes"] == 0
    assert 0 < whole["overhead_seconds"] < whole["step_seconds"]
    assert resident.difference(base) > 20
    assert total == pytest.approx(factors + workspace, abs=2)
    assert (streamed, standing) == (0, factors)
    assert factors > 16

    card.resize(INFERENCE + model + (workspace + factors // 2) * MIB)
    image, log = generate(webui, "a cat <lora:large:1>")
    total, here, streamed, _, standing = planned(log)
    assert image.same_pixels(resident)
    assert 0 < here < factors
    assert here + streamed == pytest.approx(factors, abs=2)
    assert standing <= here
    part = webui.status()["last_generation"]
    not_here = whole["measured_bytes"] - part["measured_bytes"]
    assert 0 < part["streamed_bytes"] <= not_here, (
        "Neo keeps what the text encoder said, and does not place it"
    )
    assert part["extra_bytes"] < whole["extra_bytes"]
    assert 0 < part["overhead_seconds"] < part["step_seconds"]
    assert SKIPPED not in image.infotext

    card.resize(INFERENCE)
    image, log = generate(webui, "a cat <lora:large:1>")
    assert image.same_pixels(base)
    assert re.search(SKIPPED + '"?large', image.infotext), image.infotext
    assert re.search(r"large does not fit on the card.*\d+ MB are needed.*What helps: ", log)
    assert not PLANNED.search(log)

    image, log = generate(webui, "a cat")
    assert image.same_pixels(base)
    assert SKIPPED not in image.infotext
    card.resize(INFERENCE + model + 24 * MIB)
    image, log = generate(webui, "a cat <lora:little:1>")
    assert SKIPPED not in image.infotext
    assert image.difference(base) > 0
    sizes = [
        float(size) for size in re.findall(r"(?:Trying to free|Inference Require:) ([\d.]+) MB", webui.log())
    ]
    assert sizes
    assert max(sizes) <= PLENTY / MIB
