"""An extension for a Forge Neo on the CPU that makes its host believe in a card; a test copies it there.

The card is `cpu:0`, which compares unequal to the `cpu` of its tensors. Its size is read anew at each
question from `card.json` beside this file: {"total": bytes, "inference": bytes that the host keeps for each
generation}. What stands on it is what Neo's own patchers count, and our factors.
"""

import json
import sys
from functools import wraps
from pathlib import Path

import torch
from backend import memory_management

DEVICE = torch.device("cpu", 0)
FILE = Path(__file__).with_name("card.json")


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
    standing = sum(each.model_loaded_memory() for each in memory_management.current_loaded_models)
    return number("total") - factor_bytes() - standing


def swap(name, replacement):
    setattr(memory_management, name, wraps(getattr(memory_management, name))(replacement))


free_memory = memory_management.free_memory


@wraps(free_memory)
def asked(memory_required, *args, **kwargs):
    sys.stdout.write(f"Trying to free {memory_required / 2**20:.2f} MB\n")
    sys.stdout.flush()
    return free_memory(memory_required, *args, **kwargs)


memory_management.free_memory = asked
memory_management.vram_state = memory_management.VRAMState.NORMAL_VRAM
memory_management.lowvram_available = True
for name in ("get_torch_device", "text_encoder_device", "vae_device"):
    swap(name, lambda: DEVICE)
swap("is_device_cpu", lambda device: getattr(device, "type", "") == "cpu" and device.index is None)
swap("get_total_memory", lambda dev=None, torch_total_too=False: number("total"))
swap("get_free_memory", lambda dev=None, torch_free_too=False: (free(), 0) if torch_free_too else free())
swap("minimum_inference_memory", lambda: number("inference"))
swap("extra_reserved_memory", lambda: 0)
