"""Safetensors containers: headers put together wrongly, and bytes changed in those that were right."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from lib_precision_lora.memory.headers import HeaderError, read_header
from lib_precision_lora.memory.safetensors_header import BITS
from tests.fuzz.mutate import mutated
from tests.fuzz.said import command
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.targets.files import check_refusal, inspect, read
from tests.fuzz.texts import encodable, name
from tests.memory.checkpoints import flux, write_hole

LAYERS = (
    *("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "lora_unet_img_in"),
    *("transformer.single_transformer_blocks.0.attn.to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    *(
        "base_model.model.double_blocks.0.img_attn.proj",
        "diffusion_model.double_blocks.0.txt_mlp.0",
        "nobody",
    ),
)
ENDINGS = (
    *(".lora_up.weight", ".lora_down.weight", ".alpha", ".lora_A.weight", ".lora_B.weight", ".dora_scale"),
    *(".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".lokr_w1", ".lokr_w2", ".oft_blocks", ".diff"),
    *(".diff_b", ".lora_mid.weight", ".magnitude", ".on_input", ".weight", ".a1.weight", ".oft_R.weight", ""),
    *(".comfy_quant", ".weight_scale", ".scale_weight"),
)
METADATA = (
    "ss_network_args",
    "lora_adapter_metadata",
    "format",
    "modelspec.title",
    "lora_alpha",
    "r",
    "alpha",
    "_quantization_metadata",
)
HUGE = (
    "1" * 19,
    "9" * 300,
    "1" * 5000,
    "-1",
    "1.5",
    "1e3",
    "01",
    "null",
    '"8"',
    "[8]",
    "true",
    "NaN",
    "[[1]]",
)
WORDS = (
    *(
        b'"F32"',
        b'"F16"',
        b'"F64"',
        b'"U8"',
        b'"F8_E4M3"',
        b'"F4"',
        b'"shape"',
        b'"dtype"',
        b'"data_offsets"',
    ),
    *(
        b"[0,0]",
        b"[]",
        b"[[",
        b"{",
        b"}",
        b"null",
        b"-1",
        b"1e9",
        b"9" * 30,
        b"\\ud800",
        b'\\"',
        b"\\",
        b"\x00",
    ),
    *(b'"__metadata__"', b"\xff\xfe", b"[1,1,1,1,1,1,1,1,1]", b"NaN", b" " * 100, b"\xe2\x80\xae"),
)


def make(random: Random) -> Input:
    header, data = _tensors(random)
    text = _written(random, header)
    length = len(text)
    if random.random() < 0.05:
        length = random.choice((0, length - 1, length + 1, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1)) % 2**64
    content = length.to_bytes(8, "little") + text + data
    if random.random() < 0.6:
        content = mutated(random, content, WORDS)
    return Input({"lora.safetensors": content}, random.random() < 0.5)


def _tensors(random: Random) -> tuple[dict[str, Any], bytes]:
    """A header in order, and its data."""
    header: dict[str, Any] = {}
    data = b""
    for _ in range(random.choice((0, 1, 2, 3, 6, 12))):
        key = (
            encodable(name(random))
            if random.random() < 0.15
            else random.choice(LAYERS) + random.choice(ENDINGS)
        )
        stored = random.choice(tuple(BITS) if random.random() < 0.3 else ("F32", "F16", "BF16"))
        shape = [random.choice((1, 2, 4, 8, 64)) for _ in range(random.choice((0, 1, 2, 2, 2, 4)))]
        if random.random() < 0.03:
            shape = random.choice(
                ([0], [2**31, 0, 2**31], [0, 8], [1] * 8, [1] * 9, [2**62, 2**62], [64, 2**40])
            )
        nbytes = math.prod(shape) * BITS[stored] // 8
        values = random.randbytes(min(nbytes, 2**16))
        header[key] = {"dtype": stored, "shape": shape, "data_offsets": [len(data), len(data) + nbytes]}
        data += values
    if random.random() < 0.4:
        header["__metadata__"] = {
            random.choice(METADATA): random.choice((configuration(random), encodable(name(random)), "16"))
            for _ in range(random.randint(1, 4))
        }
    return header, data


def configuration(random: Random) -> str:
    """What a header may say of ranks and alphas: read as JSON once more."""
    values: tuple[Any, ...] = (
        8,
        16.0,
        "32",
        None,
        True,
        -1,
        0,
        1e308,
        10**400,
        float("nan"),
        [],
        {},
        "x" * 1000,
    )
    field = random.choice(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    pattern = random.choice(
        (".*", "(a+)+$", "a{1000}", "[", "^img_in", "single_blocks.0", "(?=x)", "\\d" * 90, "")
    )
    value: Any = random.choice(values)
    if field.endswith("pattern") and random.random() < 0.8:
        value = {pattern: value}
    text = json.dumps({random.choice(("transformer.", "", "unet.", "x.")) + field: value, "lora_alpha": 4})
    return random.choice((text, text[:-1], "[" * 10_000, text.replace("4}", "9" * 5000 + "}")))


def _written(random: Random, header: dict[str, Any]) -> bytes:
    text = json.dumps(header, ensure_ascii=random.random() < 0.5, separators=(",", ":"))
    kind = random.random()
    if kind < 0.15 and '"shape":[' in text:
        first, second = text.split('"shape":[', 1)
        text = f'{first}"shape":[{random.choice(HUGE)},{second}'
    elif kind < 0.25 and '"data_offsets":[' in text:
        first, second = text.split('"data_offsets":[', 1)
        text = f'{first}"data_offsets":[{random.choice(HUGE)},{second.partition(",")[2]}'
    elif kind < 0.3:
        text = random.choice(
            ("[" * 100_000, '{"a":' * 50_000, "null", "[]", "{}", '{"a":{}}', "", '"', text + "x")
        )
    elif kind < 0.35:
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    model = write_hole(folder / "model.safetensors", {n: ("F16", s) for n, s in flux(True, 64, 1, 1).items()})

    def check(given: Input) -> bool:
        lora = "lora.safetensors"
        content = read(folder, lora)
        if content is not None:
            _compare(content, given.files[lora])
        inspect(folder, lora, content is not None, given.rest)
        try:
            read_header(Path(lora))
        except HeaderError as error:
            check_refusal(str(error), folder)
        command(folder, "plan", model.name, lora, "--card", "8GiB", *(["--json"] if given.rest else []))
        return content is not None

    yield check


def _compare(content: Any, stored: bytes) -> None:
    """What is accepted is what the format's own library reads, bit for bit."""
    try:
        expected = load(stored)
    except KeyError:  # a type that torch has, and that library not yet
        return
    except SafetensorError as error:
        raise Fault(f"the format's own library refuses it: {error}") from error
    same = expected.keys() == content.keys() and all(
        (tensor.dtype, tensor.shape) == (content[key].dtype, content[key].shape)
        and torch.equal(_bytes(tensor), _bytes(content[key]))
        for key, tensor in expected.items()
    )
    if not same:
        raise Fault("it is read as something else than by the format's own library")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


TARGET = Target("safetensors", make, opened)
