"""Ways to compute LoRAs beside or in a layer, each as the kernels that it starts beyond the layer's own.

    ours            as `PatchSession` attaches it
    ours, older     the same on torch before 2.8, which cannot sum half-precision products into fp32
    two products    the least: hidden = x · downᵀ in the activations' type, and y += hidden · upᵀ
    PEFT            its own layer, factors in the activations' type, as diffusers loads them
    Forge           "(fp16 LoRA)": the host's own merge in each forward, where FORGE_ROOT is set
    Neo             the same of Forge Neo, where NEO_ROOT is set: it merges into a copy of the weight

The hosts' read the files' tensors from RAM in each forward, as they keep them there; that way is counted as
if it were the card's own memory, which is faster. One process runs one host at most. All see fake CUDA
tensors. Biases are left out, and so is the decoding of a stored weight, which each needs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from benchmarks.card_layers import Layer
from benchmarks.fake_card import CARD, fake_card
from benchmarks.kernels import Kernel, counted
from lib_precision_lora.adapters import read_adapters
from lib_precision_lora.branch import PatchSession
from lib_precision_lora.branch.arithmetic import plain_form

STRENGTH = 0.7


class Files(NamedTuple):
    """How many LoRAs, of which rank, in which type."""

    count: int
    rank: int
    dtype: torch.dtype


Way = Callable[[Layer, Files], "list[Kernel]"]


@contextlib.contextmanager
def counting() -> Iterator[None]:
    """A card that is not there, which this library asks anew for what it can do."""
    plain_form._sums_in_fp32.cache_clear()
    try:
        with fake_card(), torch.no_grad():
            yield
    finally:
        plain_form._sums_in_fp32.cache_clear()


def bare(layer: Layer) -> list[Kernel]:
    """The layer's own kernels."""
    module, x = layer.module(CARD), layer.input(CARD)
    return counted(lambda: module(x))


def ours(layer: Layer, files: Files) -> list[Kernel]:
    model, x = nn.ModuleDict({"layer": layer.module(CARD)}), layer.input(CARD)
    own = len(counted(lambda: model["layer"](x)))
    with PatchSession(model) as session:
        session.apply([(str(n), read_adapters(_file(layer, files, n)), STRENGTH) for n in range(files.count)])
        session.place(CARD, x.dtype)
        return counted(lambda: model["layer"](x))[own:]


def ours_on_older_torch(layer: Layer, files: Files) -> list[Kernel]:
    with mock.patch.object(plain_form, "sums_in_fp32", return_value=False):
        return ours(layer, files)


def two_products(layer: Layer, files: Files) -> list[Kernel]:
    rows, rank = layer.weight[0], files.rank * files.count
    module, x = layer.module(CARD), layer.input(CARD)
    y = module(x)
    down = x.new_empty(rank, *layer.weight[1:])
    if not layer.kernel:
        up = x.new_empty(rank, rows)
        flat = x.view(-1, x.shape[-1])
        return counted(lambda: y.view(-1, rows).addmm_(torch.mm(flat, down.T), up))
    up = x.new_empty(rows, rank).expand(x.shape[0], -1, -1)

    def products() -> Tensor:
        hidden = conv2d(x, down, padding=layer.kernel[0] // 2).flatten(2)
        return y.flatten(2).baddbmm_(up, hidden)

    return counted(products)


def peft(layer: Layer, files: Files) -> list[Kernel]:
    from peft import LoraConfig
    from peft.tuners.lora import Conv2d, Linear

    module, x = layer.module(CARD), layer.input(CARD)
    own = len(counted(lambda: module(x)))
    config = LoraConfig(r=files.rank, lora_alpha=files.rank, init_lora_weights=False)
    names = [str(n) for n in range(files.count)]
    wrapped = (Conv2d if layer.kernel else Linear)(module, names[0], config, files.rank, files.rank)
    for name in names[1:]:
        wrapped.update_layer(name, files.rank, files.rank, config=config)
    wrapped.set_adapter(names)
    assert all(parameter.dtype == x.dtype for parameter in wrapped.parameters())
    return counted(lambda: wrapped(x))[own:]


def forge(layer: Layer, files: Files) -> list[Kernel]:
    merge = _forge_merge()
    weight = torch.empty(layer.weight, dtype=layer.dtype, device=CARD)
    patches = []
    for number in range(files.count):
        tensors = _file(layer, files, number)
        up, down = tensors["layer.lora_up.weight"], tensors["layer.lora_down.weight"]
        value = ("lora", (up, down, float(files.rank), None, None))
        patches.append((STRENGTH, value, 1.0, None, None))
    return counted(lambda: merge(patches=patches, weight=weight, computation_dtype=weight.dtype))


def neo(layer: Layer, files: Files) -> list[Kernel]:
    merge, adapter = _neo_merge()
    weight = torch.empty(layer.weight, dtype=layer.dtype, device=CARD)
    patches = []
    for number in range(files.count):
        tensors = _file(layer, files, number)
        up, down = tensors["layer.lora_up.weight"], tensors["layer.lora_down.weight"]
        value = adapter(set(), (up, down, float(files.rank), None, None, None))
        patches.append((STRENGTH, value, 1.0, None, None))
    return counted(lambda: merge(patches, weight.clone(), "layer.weight", computation_dtype=weight.dtype))


@functools.cache
def _forge_merge() -> Callable[..., Any]:
    """Forge's own function, imported as on a machine without a card."""
    with _host((os.environ["FORGE_ROOT"],), "--always-cpu"):
        return _undecorated(importlib.import_module("backend.patcher.lora").merge_lora_to_weight)


@functools.cache
def _neo_merge() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Neo's own function and the class of its LoRAs, imported as on a machine without a card."""
    root = os.environ["NEO_ROOT"]
    with _host((root, os.path.join(root, "modules_forge", "packages")), "--cpu"):
        lora = importlib.import_module("backend.patcher.lora")
        return _undecorated(lora.merge_lora_to_weight), lora.weight_adapter.LoRAAdapter


def _undecorated(merge: Any) -> Callable[..., Any]:
    """Without inference mode, in which fake tensors lack their operations; kernels are the same."""
    return merge.__wrapped__  # type: ignore[no-any-return]


@contextlib.contextmanager
def _host(folders: Sequence[str], *arguments: str) -> Iterator[None]:
    """A host's modules can be imported from its folders, as if it had been started with these arguments."""
    own = sys.argv
    sys.path[:0] = folders
    sys.argv = ["webui.py", *arguments]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of the machine
            yield
    finally:
        sys.argv = own
        for folder in folders:
            sys.path.remove(folder)


def _file(layer: Layer, files: Files, seed: int) -> dict[str, Tensor]:
    """One file on the CPU, as it is read."""
    random = torch.Generator().manual_seed(seed)
    rows, *columns = layer.weight
    down = 0.01 * torch.randn(files.rank, *columns, generator=random)
    up = 0.01 * torch.randn(rows, files.rank, *[1] * len(layer.kernel), generator=random)
    return {
        "layer.lora_down.weight": down.to(files.dtype),
        "layer.lora_up.weight": up.to(files.dtype),
        "layer.alpha": torch.tensor(float(files.rank)),
    }


def ways() -> Mapping[str, Way]:
    """Those that run here; a host's is imported at once, beside a CPU that does its work itself.

    Raises `ValueError` for two hosts: their modules have the same names.
    """
    found: dict[str, Way] = {
        "ours": ours,
        "ours, older torch": ours_on_older_torch,
        "two products": two_products,
        "PEFT": peft,
    }
    if os.environ.get("FORGE_ROOT") and os.environ.get("NEO_ROOT"):
        raise ValueError("FORGE_ROOT and NEO_ROOT are both set; one process runs one host at most")
    if os.environ.get("FORGE_ROOT"):
        _forge_merge()
        found["Forge (fp16 LoRA)"] = forge
    if os.environ.get("NEO_ROOT"):
        _neo_merge()
        found["Neo (fp16 LoRA)"] = neo
    return found
