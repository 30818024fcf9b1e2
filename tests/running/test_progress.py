"""What lasts in a running Forge is seen in its progress, and ends where the user interrupts it."""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.running.checkpoint import make_lora, save_lora
from tests.running.webui import Generation, WebUI

UNUSED_BYTES = 1200 * 2**20
NAMES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""So many that attaching them lasts well over the second from which on the log speaks of it."""
PROMPT = "a cat " + "".join(f"<lora:{name}:0.3>" for name in NAMES)
SKIPPED = "Precision LoRA skipped: "


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """With DoRAs: their norms are read from every layer, one after the other. The first
    file is large; what it has too much belongs to a text encoder that the checkpoint does not have."""
    checkpoint = folder / "models/Stable-diffusion/small.safetensors"
    for seed, name in enumerate(NAMES):
        tensors = make_lora(checkpoint, rank=8, seed=seed)
        for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
            up = tensors[key]
            tensors[key.replace("lora_up.weight", "dora_scale")] = torch.ones(
                len(up), *[1] * (up.ndim - 1), dtype=up.dtype
            )
        save_lora(folder / f"models/Lora/{name}.safetensors", tensors)
    append_unused(folder / "models/Lora/first.safetensors")
    return folder


def append_unused(path: Path) -> None:
    """Give the file one more tensor, of zeros that take no room on a disk."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = {
        "dtype": "F16",
        "shape": [UNUSED_BYTES // 16, 8],
        "data_offsets": [len(data), len(data) + UNUSED_BYTES],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    os.truncate(path, 8 + len(text) + len(data) + UNUSED_BYTES)
    with safetensors.safe_open(path, "pt") as file:
        assert len(file.keys()) == len(header) - ("__metadata__" in header)


class Watched:
    """A generation in a thread of its own, whose progress is asked for all the time.

    interrupt_at: what the progress says when Interrupt is pressed; texts: all that it said, each once in a
    row; seconds: from the press, or from the beginning, to the answer.
    """

    def __init__(self, webui: WebUI, interrupt_at: str | None = None) -> None:
        self.texts: list[str | None] = []
        self.pressed = False
        self._images: list[Generation] = []
        thread = threading.Thread(target=lambda: self._images.append(webui.generate(PROMPT)))
        since = time.monotonic()
        thread.start()
        while thread.is_alive():
            text = webui.get("progress?skip_current_image=true")["textinfo"]
            if not self.texts or text != self.texts[-1]:
                self.texts.append(text)
            if interrupt_at is not None and not self.pressed and interrupt_at in str(text):
                webui.post("interrupt", {})
                self.pressed, since = True, time.monotonic()
        self.seconds = time.monotonic() - since

    @property
    def image(self) -> Generation:
        assert self._images, "the generation failed"
        return self._images[0]

    def saw(self, part: str) -> list[str]:
        return [text for text in self.texts if text and part in text]


def forget_files(webui: WebUI) -> None:
    """Have the files read, and everything attached, anew."""
    with webui.options(precision_lora_enabled=False):
        webui.generate("a cat")


def test_progress_shows_what_lasts_and_an_interrupt_ends_it_at_once(webui: WebUI) -> None:
    position = webui.log_position()
    whole = Watched(webui)
    assert len(whole.saw("LoRA first: reading ")) > 1
    assert len(whole.saw("attaching LoRAs ")) > 3
    assert whole.texts[-1] is None
    log = webui.log(position)
    assert "[Precision LoRA] attaching LoRAs" in log, "it lasted more than a second"
    assert "attaching LoRAs: took" in log
    assert SKIPPED not in whole.image.infotext

    for part, state in (("LoRA first: reading", "read"), ("attaching LoRAs ", "attached")):
        forget_files(webui)
        position = webui.log_position()
        given_up = Watched(webui, part)
        assert given_up.pressed
        assert given_up.seconds < whole.seconds
        assert SKIPPED in given_up.image.infotext
        log = webui.log(position)
        assert f"{part.strip()}: interrupted after" in log
        assert f"the generation was interrupted while it was being {state}" in log
        assert "Traceback" not in log
        position = webui.log_position()
        again = webui.generate(PROMPT)
        assert again.same_pixels(whole.image)
        assert SKIPPED not in again.infotext
        assert "left out" not in webui.log(position)
