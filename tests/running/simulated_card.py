"""An extension for a server on the CPU that makes its host believe in a card; a test copies it there.

The card is `cpu:0`, which compares unequal to the `cpu` of its tensors. Its size is read anew at each
question from `card.json` beside this file: {"total": bytes, "inference": bytes that the host keeps for each
generation}.
"""

import json
import weakref
from functools import wraps
from pathlib import Path

import torch
from backend import memory_management

DEVICE = torch.device("cpu", 0)
FILE = Path(__file__).with_name("card.json")
standing = weakref.WeakKeyDictionary()
module_size = memory_management.module_size
load, unload = memory_management.LoadedModel.model_load, memory_management.LoadedModel.model_unload


def number(name):
    return json.loads(FILE.read_text())[name]


def factor_bytes():
    try:
        from lib_precision_lora.host import installation
    except ImportError:
        return 0
    active = installation.active()
    return 0 if active is None else sum(each.placed_bytes for each in active.sessions().values())


def free():
    return number("total") - factor_bytes() - sum(standing.values())


@wraps(load)
def model_load(loaded, model_gpu_memory_when_using_cpu_swap=-1):
    budget = model_gpu_memory_when_using_cpu_swap
    size = module_size(loaded.model.model)
    standing[loaded.model.model] = size if budget < 0 else min(budget, size)
    return load(loaded, budget)


@wraps(unload)
def model_unload(loaded, avoid_model_moving=False):
    if not avoid_model_moving:
        standing.pop(loaded.model.model, None)
    unload(loaded, avoid_model_moving)


@wraps(module_size)
def size_on(module, exclude_device=None, include_device=None, return_split=False):
    if include_device == DEVICE:
        return standing.get(module, 0)
    if exclude_device == DEVICE:
        return module_size(module) - standing.get(module, 0)
    return module_size(module, exclude_device, include_device, return_split)


def swap(name, replacement):
    setattr(memory_management, name, wraps(getattr(memory_management, name))(replacement))


memory_management.LoadedModel.model_load = model_load
memory_management.LoadedModel.model_unload = model_unload
memory_management.vram_state = memory_management.VRAMState.NORMAL_VRAM
memory_management.lowvram_available = True
swap("module_size", size_on)
swap("get_torch_device", lambda: DEVICE)
swap("text_encoder_device", lambda: DEVICE)
swap("is_device_cpu", lambda device: getattr(device, "type", "") == "cpu" and device.index is None)
swap("get_total_memory", lambda dev=None, torch_total_too=False: number("total"))
swap("get_free_memory", lambda dev=None, torch_free_too=False: (free(), 0) if torch_free_too else free())
swap("minimum_inference_memory", lambda: number("inference"))
