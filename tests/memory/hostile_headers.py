"""Headers that are made to cost whoever reads them time or memory: their size is small, or at the limits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import product

from lib_precision_lora.memory.gguf_cursor import MOST_ITEMS
from lib_precision_lora.memory.safetensors_header import LARGEST_JSON
from lib_precision_lora.memory.tensors import LONGEST_NAME, MOST_TENSORS
from tests.memory.checkpoints import MODEL, Shapes, stored_as

WRAPPER = "base_model.model."
Stored = Mapping[str, tuple[str, tuple[int, ...]]]


def safetensors(text: bytes, data: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


def tensors(entries: Stored) -> bytes:
    """A file of tensors without values, each of which has a size of zero."""
    text = json.dumps(
        {
            name: {"dtype": stored, "shape": list(shape), "data_offsets": [0, 0]}
            for name, (stored, shape) in entries.items()
        },
        separators=(",", ":"),
    )
    return safetensors(text.encode())


LONG = 400
"""Bytes of a name of which as many fit a header as there may be tensors."""


def of_length(name: str, length: int = LONG, filling: str = "x") -> str:
    """The name, filled up in the place of `~`."""
    return name.replace("~", (filling * length)[: length - len(name) + 1])


def _numbered(form: str, count: int = MOST_TENSORS) -> Iterator[str]:
    return (form.replace("#", str(number)) for number in range(count))


def _one_size(digits: int) -> bytes:
    size = b"1" * digits
    entry = b'"%d":{"dtype":"F32","shape":[%b],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % (number, size) for number in range(6_000_000 // digits)) + b"}"


def _texts(text: str) -> bytes:
    """Metadata of one text, repeated to the limit, and many short ones."""
    body = (text.encode() * LARGEST_JSON)[: LARGEST_JSON - 2**16]
    body = body[: len(body) // len(text.encode()) * len(text.encode())]
    return b'{"__metadata__":{"text":"' + body + b'"}}'


def _many_texts() -> bytes:
    pairs = (b'"%d":"%b"' % (number, b'a\\"' * 160) for number in range(MOST_TENSORS))
    return b'{"__metadata__":{' + b",".join(pairs) + b"}}"


SAFETENSORS: Mapping[str, Callable[[], bytes]] = {
    "sizes of 4,200 digits": lambda: safetensors(_one_size(4200)),
    "a size of 6,000,000 digits": lambda: safetensors(_one_size(6_000_000)),
    "90 MB of lists": lambda: safetensors(b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"),
    "lists to the limit": lambda: safetensors(b'{"a":[' + b"[]," * (LARGEST_JSON // 3 - 8) + b"[]]}"),
    "lists in lists": lambda: safetensors(b"[" * LARGEST_JSON),
    "lists in the metadata": lambda: safetensors(
        b'{"__metadata__":{"a":[' + b"[]," * (LARGEST_JSON // 3 - 16) + b"[]]}}"
    ),
    "a shape of millions": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"1," * (LARGEST_JSON // 2 - 64) + b'1],"data_offsets":[0,4]}}', 4
    ),
    "spaces to the limit": lambda: safetensors(b"{" + b" " * (LARGEST_JSON - 2) + b"}"),
    "quotation marks to the limit": lambda: safetensors(b"{" + b'"' * (LARGEST_JSON - 1)),
    "backslashes to the limit": lambda: safetensors(b'{"' + b"\\" * (LARGEST_JSON - 2)),
    "escapes in a text": lambda: safetensors(_texts('ab\\"')),
    "emoji in a text": lambda: safetensors(_texts("\N{SNOWMAN}\N{FISH CAKE WITH SWIRL DESIGN}")),
    "many texts with escapes": lambda: safetensors(_many_texts()),
    "a name without an end": lambda: safetensors(b'{"' + b"a" * (LARGEST_JSON - 2)),
    "more tensors than are read": lambda: tensors(
        dict.fromkeys(_numbered("#.lora_up.weight", 4 * MOST_TENSORS), ("F32", (0,)))
    ),
}
"""Those that no format allows, and texts that a format allows at any length."""

GGUF_TEXT, GGUF_ARRAY, GGUF_BYTE = 8, 9, 0


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(tensor_count: int, value_count: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, value_count) + rest


def _gguf_array(kind: int, count: int, items: bytes) -> bytes:
    return gguf_text(b"array") + struct.pack("<IIQ", GGUF_ARRAY, kind, count) + items


def _gguf_names(count: int) -> Iterator[bytes]:
    return (f"{number:08}".encode().ljust(LONGEST_NAME, b".") for number in range(count))


def _gguf_infos(count: int) -> bytes:
    return b"".join(gguf_text(name) + struct.pack("<IQIQ", 1, 0, 0, 0) for name in _gguf_names(count))


GGUF: Mapping[str, Callable[[], bytes]] = {
    "a million empty texts": lambda: gguf(0, 1, _gguf_array(GGUF_TEXT, MOST_ITEMS, bytes(8 * MOST_ITEMS))),
    "four million empty texts": lambda: gguf(0, 1, _gguf_array(GGUF_TEXT, 2**22, bytes(2**25))),
    "a million arrays": lambda: gguf(
        0, 1, _gguf_array(GGUF_ARRAY, MOST_ITEMS, struct.pack("<IQ", 0, 0) * MOST_ITEMS)
    ),
    "arrays of texts in arrays": lambda: gguf(
        0,
        1,
        _gguf_array(GGUF_ARRAY, 2**16, (struct.pack("<IQ", GGUF_TEXT, 16) + bytes(8 * 16)) * 2**16),
    ),
    "many values": lambda: gguf(
        0,
        MOST_TENSORS,
        b"".join(gguf_text(n) + struct.pack("<IB", GGUF_BYTE, 0) for n in _gguf_names(MOST_TENSORS)),
    ),
    "millions of values": lambda: gguf(0, 2**21, (gguf_text(b"") + struct.pack("<IB", GGUF_BYTE, 0)) * 2**21),
    "many tensors": lambda: gguf(MOST_TENSORS, 0, _gguf_infos(MOST_TENSORS)),
    "a text of 30 MB": lambda: gguf(
        0, 1, gguf_text(b"text") + struct.pack("<I", GGUF_TEXT) + gguf_text(b"\xf0\x9f\x8d\xa5" * 7_500_000)
    ),
    "texts to the limit": lambda: gguf(
        0,
        400,
        b"".join(
            gguf_text(b"%d" % number) + struct.pack("<I", GGUF_TEXT) + gguf_text(b"\xf0\x9f\x8d\xa5" * 16_000)
            for number in range(400)
        ),
    ),
}


def _long(form: str, count: int, filling: str = "x") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {of_length(name, filling=filling): ("F16", (2, 2)) for name in _numbered(form, count)}


LORAS: Mapping[str, Callable[[], Stored]] = {
    "unknown layers with the longest names": lambda: _long("transformer.~#.diff", MOST_TENSORS),
    "names full of dots": lambda: _long("lora_unet_~#.diff", MOST_TENSORS, "."),
    "names full of endings": lambda: _long("~#.lora_A.name.weight", MOST_TENSORS, ".lora_A"),
    "unknown endings": lambda: {"a.diff": ("F16", (2, 2))} | _long("a~#.other", MOST_TENSORS - 1),
    "one layer under many names": lambda: {
        f"{WRAPPER * a}double_{WRAPPER * b}blocks.0.{WRAPPER * c}img_attn.{WRAPPER * d}qkv.oft_R.weight": (
            "F16",
            (4, 6),
        )
        for a, b, c, d in product(range(7), repeat=4)
    },
    "a butterfly of many stages": lambda: {"img_in.boft_R": ("U8", (10**7, 1, 1, 1))},
    "many layers of LoKr": lambda: {
        f"double_blocks.{number}.img_attn.qkv.lokr_{part}": ("F16", (2, 2))
        for number in range(MOST_TENSORS // 2)
        for part in ("w1", "w2")
    },
}
"""Well-formed LoRA files with much to look up."""


def _checkpoint(base: Shapes, more: Stored) -> Stored:
    return {**stored_as("F16", base, MODEL), **dict(list(more.items())[: MOST_TENSORS - len(base)])}


def checkpoints(flux: Shapes, unet: Shapes, sd3: Shapes) -> Mapping[str, Callable[[], Stored]]:
    """Well-formed checkpoints with more layers than any has."""
    small = ("F16", (2, 2))
    return {
        "layers with the longest names": lambda: _checkpoint(flux, _long(f"{MODEL}~#.weight", MOST_TENSORS)),
        "layers full of dots": lambda: _checkpoint(
            unet, _long(f"{MODEL}input_blocks.#~.weight", MOST_TENSORS, ".")
        ),
        "blocks of a UNet": lambda: _checkpoint(
            unet, {f"{MODEL}input_blocks.{n}.0.in_layers.2.weight": small for n in range(MOST_TENSORS)}
        ),
        "levels of a UNet": lambda: _checkpoint(
            unet, {f"{MODEL}input_blocks.{n}.0.op.weight": small for n in range(12, MOST_TENSORS)}
        ),
        "last blocks of an SD 3": lambda: _checkpoint(
            sd3,
            {
                f"{MODEL}joint_blocks.{n}.context_block.adaLN_modulation.1.weight": small
                for n in range(MOST_TENSORS)
            },
        ),
        "layers of a CLIP-G alone": lambda: _checkpoint(
            unet,
            {
                f"conditioner.embedders.0.model.transformer.resblocks.{n}.mlp.c_fc.weight": small
                for n in range(MOST_TENSORS)
            },
        ),
        "numbers of thousands of digits": lambda: _checkpoint(
            flux, {f"{MODEL}joint_blocks.{'9' * 450}.x_block.attn.qkv.weight": small}
        ),
        "features of the prompt": lambda: _checkpoint(
            {"input_blocks.0.0.weight": (320, 4, 3, 3)},
            {
                f"{MODEL}input_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight": ("F16", (1, n))
                for n in range(1, MOST_TENSORS // 8)
            },
        ),
    }
