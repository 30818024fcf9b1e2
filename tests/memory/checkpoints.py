"""Checkpoints of the true names and shapes, as files whose data is a hole.

The header is written and the file is truncated to its full length: 12 GB that take a few blocks of disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "I64": 8}
MODEL = "model.diffusion_model."


def write_hole(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    filled: Mapping[str, bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """tensors: name → type and shape; filled: the tensors that get values."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end, places = 0, {}
    for name, (stored, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * BYTES[stored]
        header[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [begin, end]}
        places[name] = begin
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, values in (filled or {}).items():
            file.seek(8 + len(text) + places[name])
            file.write(values)
    return path


def stored_as(stored: str, shapes: Shapes, prefix: str = "") -> dict[str, tuple[str, tuple[int, ...]]]:
    return {prefix + name: (stored, shape) for name, shape in shapes.items()}


def linear(name: str, rows: int, columns: int, bias: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def conv(name: str, rows: int, columns: int, kernel: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns, kernel, kernel)
    yield f"{name}.bias", (rows,)


def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def flux(guidance: bool = True, hidden: int = 3072, double: int = 19, single: int = 38) -> Shapes:
    """Black Forest Labs' Flux: 11.9 billion parameters."""
    return dict(_flux(guidance, hidden, double, single))


def _flux(guidance: bool, hidden: int, double: int, single: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from linear("img_in", hidden, 64)
    for name, width in (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guidance else [])):
        yield from linear(f"{name}.in_layer", hidden, width)
        yield from linear(f"{name}.out_layer", hidden, hidden)
    yield from linear("txt_in", hidden, 4096)
    for index in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            yield from linear(f"{block}_mod.lin", 6 * hidden, hidden)
            yield from linear(f"{block}_attn.qkv", 3 * hidden, hidden)
            yield f"{block}_attn.norm.query_norm.scale", (128,)
            yield f"{block}_attn.norm.key_norm.scale", (128,)
            yield from linear(f"{block}_attn.proj", hidden, hidden)
            yield from linear(f"{block}_mlp.0", 4 * hidden, hidden)
            yield from linear(f"{block}_mlp.2", hidden, 4 * hidden)
    for index in range(single):
        block = f"single_blocks.{index}"
        yield from linear(f"{block}.linear1", 7 * hidden, hidden)
        yield from linear(f"{block}.linear2", hidden, 5 * hidden)
        yield f"{block}.norm.query_norm.scale", (128,)
        yield f"{block}.norm.key_norm.scale", (128,)
        yield from linear(f"{block}.modulation.lin", 3 * hidden, hidden)
    yield from linear("final_layer.linear", 64, hidden)
    yield from linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)


def chroma() -> Shapes:
    """Flux without modulation layers, with one network that makes all modulations."""
    shapes = {name: shape for name, shape in flux(guidance=False).items() if "mod" not in name}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith(("time_in", "vector_in"))}
    for name, rows, columns in (("in_proj", 5120, 64), ("out_proj", 3072, 5120)):
        shapes |= dict(linear(f"distilled_guidance_layer.{name}", rows, columns))
    for index in range(5):
        for name in ("in_layer", "out_layer"):
            shapes |= dict(linear(f"distilled_guidance_layer.layers.{index}.{name}", 5120, 5120))
        shapes[f"distilled_guidance_layer.norms.{index}.scale"] = (5120,)
    return shapes


def sd15_unet() -> Shapes:
    """859.5 million parameters."""
    return dict(_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, matrices=False))


def sd2_unet() -> Shapes:
    return dict(_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, matrices=True))


def sdxl_unet() -> Shapes:
    """2567.5 million parameters."""
    return dict(_unet(320, (1, 2, 4), (0, 2, 10), 2048, matrices=True, vector=2816))


def sdxl_refiner_unet() -> Shapes:
    return dict(_unet(384, (1, 2, 4, 4), (0, 4, 4, 0), 1280, matrices=True, vector=2560, middle=4))


def _unet(
    width: int,
    factors: Sequence[int],
    depths: Sequence[int],
    context: int,
    matrices: bool,
    vector: int = 0,
    middle: int | None = None,
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Two residual blocks per level, and one more on the way up."""
    embedding = 4 * width
    yield from linear("time_embed.0", embedding, width)
    yield from linear("time_embed.2", embedding, embedding)
    if vector:
        yield from linear("label_emb.0.0", embedding, vector)
        yield from linear("label_emb.0.2", embedding, embedding)
    yield from conv("input_blocks.0.0", width, 4)
    here, skips, numbers = width, [width], count(1)
    for level, factor in enumerate(factors):
        for _ in range(2):
            block = f"input_blocks.{next(numbers)}"
            yield from _resnet(f"{block}.0", here, factor * width, embedding)
            here = factor * width
            if depths[level]:
                yield from _transformer(f"{block}.1", here, depths[level], context, matrices)
            skips.append(here)
        if level < len(factors) - 1:
            yield from conv(f"input_blocks.{next(numbers)}.0.op", here, here)
            skips.append(here)
    yield from _resnet("middle_block.0", here, here, embedding)
    yield from _transformer("middle_block.1", here, middle or depths[-1] or 1, context, matrices)
    yield from _resnet("middle_block.2", here, here, embedding)
    numbers = count()
    for level, factor in reversed(list(enumerate(factors))):
        for index in range(3):
            block = f"output_blocks.{next(numbers)}"
            yield from _resnet(f"{block}.0", here + skips.pop(), factor * width, embedding)
            here = factor * width
            if depths[level]:
                yield from _transformer(f"{block}.1", here, depths[level], context, matrices)
            if level and index == 2:
                yield from conv(f"{block}.{2 if depths[level] else 1}.conv", here, here)
    yield from norm("out.0", width)
    yield from conv("out.2", 4, width)


def _resnet(name: str, given: int, made: int, embedding: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from norm(f"{name}.in_layers.0", given)
    yield from conv(f"{name}.in_layers.2", made, given)
    yield from linear(f"{name}.emb_layers.1", made, embedding)
    yield from norm(f"{name}.out_layers.0", made)
    yield from conv(f"{name}.out_layers.3", made, made)
    if given != made:
        yield from conv(f"{name}.skip_connection", made, given, kernel=1)


def _transformer(
    name: str, width: int, depth: int, context: int, matrices: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    def projection(part: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return linear(part, width, width) if matrices else conv(part, width, width, kernel=1)

    yield from norm(f"{name}.norm", width)
    yield from projection(f"{name}.proj_in")
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, source in (("attn1", width), ("attn2", context)):
            yield from linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from linear(f"{block}.{attention}.to_k", width, source, bias=False)
            yield from linear(f"{block}.{attention}.to_v", width, source, bias=False)
            yield from linear(f"{block}.{attention}.to_out.0", width, width)
        yield from linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from linear(f"{block}.ff.net.2", width, 4 * width)
        for number in (1, 2, 3):
            yield from norm(f"{block}.norm{number}", width)
    yield from projection(f"{name}.proj_out")


def sd3(depth: int, dual: bool = False) -> Shapes:
    """Stability's MMDiT of width 64 · depth; the last block's context makes keys and values alone."""
    return dict(_sd3(64 * depth, depth, dual))


def _sd3(width: int, depth: int, dual: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "pos_embed", (1, 36864, width)
    yield from conv("x_embedder.proj", width, 16, kernel=2)
    for name, source in (("t_embedder", 256), ("y_embedder", 2048)):
        yield from linear(f"{name}.mlp.0", width, source)
        yield from linear(f"{name}.mlp.2", width, width)
    yield from linear("context_embedder", width, 4096)
    for index in range(depth):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{index}.{stream}"
            last = stream == "context_block" and index == depth - 1
            twice = dual and stream == "x_block" and index < 13
            yield from linear(f"{block}.attn.qkv", 3 * width, width)
            if twice:
                yield from linear(f"{block}.attn2.qkv", 3 * width, width)
                yield from linear(f"{block}.attn2.proj", width, width)
            yield from linear(
                f"{block}.adaLN_modulation.1", (2 if last else 9 if twice else 6) * width, width
            )
            if not last:
                yield from linear(f"{block}.attn.proj", width, width)
                yield from linear(f"{block}.mlp.fc1", 4 * width, width)
                yield from linear(f"{block}.mlp.fc2", width, 4 * width)
    yield from linear("final_layer.adaLN_modulation.1", 2 * width, width)
    yield from linear("final_layer.linear", 64, width)


def clip_l() -> Shapes:
    """OpenAI's CLIP-L text model, in the host's names: 123.06 million parameters."""
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 768),
        "text_model.embeddings.position_embedding.weight": (77, 768),
        **dict(norm("text_model.final_layer_norm", 768)),
    }
    for index in range(12):
        layer = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= dict(linear(f"{layer}.self_attn.{part}", 768, 768))
        shapes |= dict(linear(f"{layer}.mlp.fc1", 3072, 768)) | dict(linear(f"{layer}.mlp.fc2", 768, 3072))
        shapes |= dict(norm(f"{layer}.layer_norm1", 768)) | dict(norm(f"{layer}.layer_norm2", 768))
    return shapes


def clip_g() -> Shapes:
    """OpenCLIP's bigG text model, in its own names: 694.7 million parameters."""
    shapes: Shapes = {
        "token_embedding.weight": (49408, 1280),
        "positional_embedding": (77, 1280),
        "text_projection": (1280, 1280),
        **dict(norm("ln_final", 1280)),
    }
    for index in range(32):
        layer = f"transformer.resblocks.{index}"
        shapes |= {f"{layer}.attn.in_proj_weight": (3840, 1280), f"{layer}.attn.in_proj_bias": (3840,)}
        shapes |= dict(linear(f"{layer}.attn.out_proj", 1280, 1280))
        shapes |= dict(linear(f"{layer}.mlp.c_fc", 5120, 1280)) | dict(
            linear(f"{layer}.mlp.c_proj", 1280, 5120)
        )
        shapes |= dict(norm(f"{layer}.ln_1", 1280)) | dict(norm(f"{layer}.ln_2", 1280))
    return shapes


def as_nf4(
    shapes: Shapes, prefix: str = MODEL
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, bytes]]:
    """Tensors and quant states of a checkpoint whose matrices bitsandbytes has packed, plain statistics."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    filled = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight"):
            tensors[prefix + name] = ("BF16", shape)
            continue
        n = math.prod(shape)
        state = json.dumps(
            {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
        ).encode()
        key = prefix + name
        tensors[key] = ("U8", (n // 2, 1))
        tensors[f"{key}.absmax"] = ("F32", (n // 64,))
        tensors[f"{key}.quant_map"] = ("F32", (16,))
        tensors[f"{key}.quant_state.bitsandbytes__nf4"] = ("U8", (len(state),))
        filled[f"{key}.quant_state.bitsandbytes__nf4"] = state
    return tensors, filled


def write_gguf_hole(path: Path, shapes: Shapes) -> Path:
    """A GGUF file with its matrices as Q8_0 and the rest in fp32, whose data is a hole."""
    import gguf
    import numpy as np

    writer, end = gguf.GGUFWriter(path, "flux"), 0
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % 32 == 0:
            nbytes, kind = math.prod(shape) // 32 * 34, gguf.GGMLQuantizationType.Q8_0
            stored: Sequence[int] = (shape[0], shape[1] // 32 * 34)
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=kind)
        else:
            nbytes = 4 * math.prod(shape)
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        end += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + end)
    return path
