"""Tensors of a LoRA that were in order, and are not any more."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import Tensor

from lib_precision_lora.names.endings import ENDINGS

Tensors = dict[str, Tensor]
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.int8, torch.uint8, torch.int64),
    *(torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16),
    *(getattr(torch, name) for name in ("float8_e8m0fnu", "float8_e4m3fnuz") if hasattr(torch, name)),
)
VALUES = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 65504.0, 65536.0, 1e30, -3.4e38),
    *(1e300, -1e300, 1e-40, 1e-300, 0.5, 1e4),
)
ENDS = tuple(ENDINGS)
PIECES = ("_", ".", "..", ".weight", " ", "\n", ".default", ".alpha", "\x1b[2J", "." * 300, "猫")
SIZES = ((12, 8), (8, 12), (-1, 8), (2**62, 2**62), (96,))
PLACES = (0, 1, 7, 8, -1, 2**40)
OTHER_ALPHAS = (
    *(torch.tensor(0), torch.tensor(7), torch.tensor(True)),
    *(torch.ones(3), torch.ones(0), torch.ones(1, 1), torch.ones(2**12)),
)


def change(random: Random, tensors: Tensors) -> None:
    """One change of one tensor, or of a name."""
    if tensors:
        random.choice(_CHANGES)(random, tensors)


def _retype(random: Random, tensors: Tensors) -> None:
    key = random.choice(list(tensors))
    tensors[key] = tensors[key].to(random.choice(DTYPES))


def _retype_all(random: Random, tensors: Tensors) -> None:
    dtype = random.choice(DTYPES[:4])
    for key, tensor in tensors.items():
        tensors[key] = tensor.to(dtype)


def _poison(random: Random, tensors: Tensors) -> None:
    """One value, or all of them."""
    key = random.choice(list(tensors))
    tensor, value = tensors[key].to(torch.float64).contiguous().clone(), random.choice(VALUES)
    if tensor.numel():
        flat = tensor.view(-1)
        flat[random.randrange(flat.numel()) if random.random() < 0.7 else slice(None)] = value
    tensors[key] = tensor if random.random() < 0.3 or abs(value) > 3.4e38 else tensor.float()


def _scale(random: Random, tensors: Tensors) -> None:
    key = random.choice(list(tensors))
    if tensors[key].dtype.is_floating_point:
        tensors[key] = tensors[key].double() * 10.0 ** random.randint(-60, 60)
        if random.random() < 0.7:
            tensors[key] = tensors[key].float()


def _reshape(random: Random, tensors: Tensors) -> None:
    key = random.choice(list(tensors))
    tensors[key] = random.choice(_SHAPES)(tensors[key])


def _expand(tensor: Tensor) -> Tensor:
    return tensor.flatten()[0].expand(tensor.shape) if tensor.numel() else tensor


_SHAPES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda tensor: tensor.flatten(),
    lambda tensor: tensor[None],
    lambda tensor: tensor[..., None, None],
    lambda tensor: tensor.mT if tensor.ndim > 1 else tensor,
    lambda tensor: tensor[:1] if tensor.ndim else tensor,
    lambda tensor: tensor[:0] if tensor.ndim else tensor,
    lambda tensor: tensor[..., :-1] if tensor.ndim else tensor,
    lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor.expand(3),
    lambda tensor: tensor.flatten()[0] if tensor.numel() else tensor,
    lambda tensor: torch.cat([tensor.flatten()] * 2)[::2] if tensor.ndim == 1 else tensor.flip(0),
    lambda tensor: tensor.reshape(-1, 1),
    lambda tensor: tensor.reshape(*(1,) * 8, -1),
    lambda tensor: tensor.repeat(2, *(1,) * (tensor.ndim - 1)) if tensor.ndim else tensor,
    lambda tensor: torch.empty(2**40, 0, *(4,) * max(0, tensor.ndim - 2)),
    lambda tensor: tensor[None].expand(3, *tensor.shape),
    _expand,
)


def _drop(random: Random, tensors: Tensors) -> None:
    del tensors[random.choice(list(tensors))]


def _exchange(random: Random, tensors: Tensors) -> None:
    one, other = random.choice(list(tensors)), random.choice(list(tensors))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def _rename(random: Random, tensors: Tensors) -> None:
    """As another part of its layer, or as a part that is there beside it."""
    key = random.choice(list(tensors))
    layer, ending = key.partition(".")[0], random.choice(ENDS)
    tensor = tensors.pop(key) if random.random() < 0.5 else tensors[key]
    tensors[layer + ending] = tensor


def _rename_wrongly(random: Random, tensors: Tensors) -> None:
    key = random.choice(list(tensors))
    end = random.choice(
        ("_", ".", "..", ".weight", " ", "\n", ".default", ".alpha", "\x1b[2J", "." * 300, "猫")
    )
    place = random.randrange(len(key) + 1)
    tensors[key[:place] + end + key[place:]] = tensors.pop(key)


def _alpha(random: Random, tensors: Tensors) -> None:
    layer = random.choice(list(tensors)).partition(".")[0]
    role = random.choice(("alpha", "alpha", "on_input", "bias_size", "lambda_layer"))
    number = torch.tensor(random.choice(VALUES), dtype=random.choice((torch.float32, torch.float64)))
    tensors[f"{layer}.{role}"] = random.choice((number, number, *OTHER_ALPHAS))


def _sparse(random: Random, tensors: Tensors) -> None:
    """LyCORIS's sparse rest, with places that are there or not."""
    layer, count = random.choice(list(tensors)).partition(".")[0], random.choice((0, 1, 3))
    places = torch.tensor([random.choice(PLACES) for _ in range(2 * count)]).view(2, count)
    tensors[f"{layer}.bias_indices"] = places.to(random.choice((torch.int64, torch.float32)))
    tensors[f"{layer}.bias_values"] = torch.ones(random.choice((count, count + 1)))
    tensors[f"{layer}.bias_size"] = torch.tensor(random.choice(SIZES))


_CHANGES = (
    *(_retype, _retype_all, _poison, _poison, _scale, _reshape, _reshape, _reshape, _drop, _exchange),
    *(_rename, _rename, _rename_wrongly, _alpha, _sparse),
)
