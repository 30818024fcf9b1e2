"""A `.pt` whose code would run: by a prompt and by each route nothing runs, and the file stays what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.containers.hostile import RUNNING, marker_of
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate
from tests.host.lora_files import Active, exact_output, make_lora
from tests.host.webui import Host

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

COMMANDS = ("a command", "a command in the older form")


@pytest.fixture(params=COMMANDS)
def code(host: Host, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The file; of it and its folder, nothing may change."""
    path = host.lora_dir / "code.pt"
    RUNNING[request.param][0](path)
    host.networks.list_available_networks()
    before = path.read_bytes(), path.stat().st_mtime_ns
    yield path
    assert not marker_of(path).exists(), "its code ran"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert not list(host.lora_dir.glob("*.corrupted*"))


def test_by_a_prompt_it_is_left_out_with_the_reason(host: Host, checkpoint: Checkpoint, code: Path) -> None:
    cats = make_lora("cats")
    cats.write(host)
    image = generate(host, "a cat<lora:code:1><lora:cats:1>")
    (comment,) = image.comments
    assert "it holds more than weights" in comment
    assert str(host.lora_dir) not in comment
    assert image.parameters["Precision LoRA skipped"] == "code"
    assert distance(image, exact_output(checkpoint, "a cat", [Active(cats)])) < 1e-5


@pytest.mark.parametrize("route", ["inspect", "plan"])
def test_by_a_route_nothing_of_it_is_read(
    host: Host, checkpoint: Checkpoint, code: Path, api: TestClient, route: str
) -> None:
    answer = api.get(f"/precision-lora/v1/{route}", params={"lora": "code"})
    assert answer.status_code == 422
    assert "it is a pickled file, of which nothing is read here" in answer.json()["detail"]
    assert str(host.lora_dir) not in answer.text
