"""Names of prompts, files and keys in the console, under images, in infotexts and answers: text alone."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from lib_precision_lora.host import installation
from lib_precision_lora.host.logs import set_up_logging
from tests.host.checkpoints import Checkpoint
from tests.host.images import generate
from tests.host.lora_files import make_lora
from tests.host.webui import Host
from tests.hostile_text import HALF, NAMES, acting

PREFIX = "[Precision LoRA] "
WRITTEN = [name for name in NAMES if name != HALF]
"""Those that a file can have as a key: its header is UTF-8."""


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The WebUI's console, with our log in it."""
    logger, stream = logging.getLogger("lib_precision_lora"), io.StringIO()
    before = logger.handlers[:], logger.filters[:], logger.level, logger.propagate
    logger.handlers[:], logger.filters[:] = [], []
    monkeypatch.setattr(sys, "stdout", stream)
    set_up_logging()
    yield stream
    logger.handlers[:], logger.filters[:], logger.level, logger.propagate = before


def shown(console: io.StringIO) -> list[str]:
    """The lines of the log; none of them acts, each of them is ours."""
    lines = [line for line in console.getvalue().split("\n") if line]
    assert acting(console.getvalue()) == set()
    assert all(line.startswith((PREFIX, "    ")) for line in lines)
    return lines


def said(image: Any) -> str:
    """All that stands under an image and in its parameters, and the report of its generation."""
    active = installation.active()
    assert active is not None
    reports = [entry.file.problem or "" for entry in active.record.present.entries]
    return "\n".join([*image.comments, *map(str, image.parameters.values()), *reports])


@pytest.mark.parametrize("name", [name for name in NAMES if "\x00" not in name and ">" not in name])
def test_a_name_of_the_prompt_forges_no_line(
    host: Host, checkpoint: Checkpoint, console: io.StringIO, name: str
) -> None:
    prompt_name = name.replace(":", ";").replace("=", "-")  # these two part what stands in the brackets
    image = generate(host, f"a cat<lora:{prompt_name}:1>")
    lines = shown(console)
    assert len(lines) == 1
    assert "there is no file of this name" in lines[0]
    assert acting(said(image)) == set()
    assert list(image.comments) == [lines[0].removeprefix(PREFIX)]
    assert image.parameters["Precision LoRA skipped"]
    assert "\n" not in image.parameters["Precision LoRA skipped"]


@pytest.mark.parametrize("key", WRITTEN)
def test_a_key_that_belongs_to_no_layer_forges_no_line(
    host: Host, checkpoint: Checkpoint, console: io.StringIO, key: str
) -> None:
    lora = make_lora("cats").with_tensors(lambda tensors: tensors.update({key: torch.ones(1)}))
    lora.write(host)
    generate(host, "a cat<lora:cats:1>")
    assert "1 keys belong to no layer" in "\n".join(shown(console))


@pytest.mark.parametrize("key", WRITTEN)
def test_a_key_in_an_error_forges_no_line(
    host: Host, checkpoint: Checkpoint, console: io.StringIO, key: str
) -> None:
    """Half a LoRA: the reader names its layer, and what is missing."""
    tensors = {f"{key}.lora_up.weight": torch.ones(8, 2)}
    safetensors.torch.save_file(tensors, host.lora_dir / "half.safetensors")
    image = generate(host, "a cat<lora:half:1>")
    lines = shown(console)
    assert len(lines) == 1
    assert image.comments
    assert acting(said(image)) == set()


def test_a_traceback_with_a_foreign_text_forges_no_line(
    host: Host,
    checkpoint: Checkpoint,
    console: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_lora("cats").write(host)
    active = installation.active()
    assert active is not None

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"broken\n{PREFIX}forged\x1b[31m")

    monkeypatch.setattr(host.networks, "load_network", fail)
    image = generate(host, "a cat<lora:cats:1>")
    lines = shown(console)
    assert any("Traceback" in line for line in lines)
    assert not any(line.startswith(f"{PREFIX}forged") for line in lines)
    assert acting(said(image)) == set()


@pytest.mark.parametrize("name", ["猫猫", "it's a cat – no. 1, really", "кот-2", "naïve\u00a0café"])
def test_a_name_that_harms_nobody_is_shown_as_it_is(
    host: Host, checkpoint: Checkpoint, console: io.StringIO, name: str
) -> None:
    make_lora(name).write(host)
    host.networks.list_available_networks()
    image = generate(host, f"a cat<lora:{name}:1>")
    assert not image.comments
    assert f"LoRA {name}: " in shown(console)[0]
