"""GGUF headers, as `plan` reads them of a checkpoint, and a GGUF file in the place of a LoRA."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from lib_precision_lora.memory.gguf_cursor import NUMBERS
from lib_precision_lora.memory.gguf_header import ORIGINAL_SHAPE, TYPES
from lib_precision_lora.memory.headers import HeaderError, read_header
from tests.fuzz.mutate import LENGTHS, mutated
from tests.fuzz.said import command
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.targets.files import check_refusal, read
from tests.fuzz.texts import encodable, name
from tests.memory.checkpoints import flux, write_hole

MODEL = flux(True, 32, 1, 1)
STRING, ARRAY = 8, 9
KEYS = ("general.architecture", "general.alignment", "general.name", "tokenizer.ggml.tokens", ORIGINAL_SHAPE)
WORDS = (
    b"GGUF",
    *(struct.pack("<Q", number) for number in LENGTHS),
    *(struct.pack("<I", kind) for kind in range(45)),
)


def make(random: Random) -> Input:
    values = dict(_metadata(random) for _ in range(random.choice((0, 0, 1, 3))))
    infos, size = [], 0
    for key, shape in MODEL.items():
        kind = 0 if random.random() < 0.97 else random.choice(tuple(TYPES))
        sizes = list(reversed(shape))
        if random.random() < 0.003:
            sizes = [random.choice((0, 1, *LENGTHS)) for _ in range(random.choice((0, 1, 2, 9)))]
        key = encodable(name(random)) if random.random() < 0.003 else key
        written = key.encode()
        infos.append(
            struct.pack("<Q", len(written)) + written + struct.pack("<I", len(sizes))
            + b"".join(struct.pack("<Q", number) for number in sizes) + struct.pack("<IQ", kind, size)
        )  # fmt: skip
        size += -(-4 * math.prod(shape) // 32) * 32
    version = 3 if random.random() < 0.97 else random.choice((0, 1, 2, 4, 2**32 - 1))
    head = struct.pack("<4sIQQ", b"GGUF", version, len(infos), len(values)) + b"".join(values.values())
    content = head + b"".join(infos)
    if random.random() < 0.5:
        content = mutated(random, content, WORDS)
    content += bytes(-len(content) % 32) + bytes(size)
    if random.random() < 0.1:
        content = content[: random.randrange(len(content))]
    return Input({"model.gguf": content}, random.random() < 0.5)


def _metadata(random: Random) -> tuple[str, bytes]:
    key = encodable(name(random)) if random.random() < 0.2 else random.choice(KEYS)
    if key == ORIGINAL_SHAPE:
        key += random.choice(tuple(MODEL))
    kind = random.choice((*NUMBERS, STRING, ARRAY, 13, 2**31))
    if key == "general.alignment" and random.random() < 0.5:
        kind = 4
    written = key.encode()
    return key, struct.pack("<Q", len(written)) + written + struct.pack("<I", kind) + _value(random, kind)


def _value(random: Random, kind: int, depth: int = 0) -> bytes:
    if kind in NUMBERS:
        return random.choice((bytes(8), b"\x20" + bytes(7), b"\xff" * 8, random.randbytes(8)))[
            : NUMBERS[kind].size
        ]
    if kind == STRING:
        content = encodable(name(random)).encode()
        length = len(content) if random.random() < 0.9 else random.choice(LENGTHS)
        return struct.pack("<Q", length) + content
    if kind == ARRAY and depth < 6:
        item = random.choice((*NUMBERS, STRING, ARRAY, 13))
        count = random.choice((0, 1, 2, 4, 17, 100))
        items = b"".join(_value(random, item, depth + 1) for _ in range(min(count, 4 if depth > 2 else 100)))
        count = count if random.random() < 0.9 else random.choice(LENGTHS)
        return struct.pack("<IQ", item, count) + items[:20_000]
    return random.randbytes(4)


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    up, down = "double_blocks.0.img_attn.qkv.lora_up.weight", "double_blocks.0.img_attn.qkv.lora_down.weight"
    shapes: Mapping[str, Any] = {up: ("F16", (96, 4)), down: ("F16", (4, 32))}
    lora = write_hole(folder / "lora.safetensors", shapes)

    def check(given: Input) -> bool:
        try:
            read_header(Path("model.gguf"))
            accepted = True
        except HeaderError as error:
            check_refusal(str(error), folder)
            accepted = False
        as_json = ["--json"] if given.rest else []
        code = command(folder, "plan", "model.gguf", lora.name, "--card", "8GiB", *as_json)
        if not accepted and code != 2:
            raise Fault(f"plan says {code} of a header that is refused")
        if given.files["model.gguf"][:4] == b"GGUF" and read(folder, "model.gguf") is not None:
            raise Fault("a GGUF file was read as a LoRA")
        return accepted

    yield check


TARGET = Target("gguf", make, opened)
