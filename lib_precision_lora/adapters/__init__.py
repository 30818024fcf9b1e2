"""LoRA-family adapters: read from a file or from the host's patches, composed into effective weights."""

from lib_precision_lora.adapters.adapter import Adapter, AdapterError, adapter_bytes
from lib_precision_lora.adapters.diff import Assign, Diff
from lib_precision_lora.adapters.dora import DoRA
from lib_precision_lora.adapters.forge_patch import ForgePatch, from_forge_patch, to_forge_patch
from lib_precision_lora.adapters.lora import LoRA, make_lora
from lib_precision_lora.adapters.reader import AdapterFile, read_adapters
from lib_precision_lora.adapters.steps import Add, Left, Right, Running, Step
from lib_precision_lora.adapters.target import Target, row_order
from lib_precision_lora.adapters.terms import Dense, Kronecker, LowRank
from lib_precision_lora.adapters.widening import channels_of, with_channels

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterFile",
    "Add",
    "Assign",
    "Dense",
    "Diff",
    "DoRA",
    "ForgePatch",
    "Kronecker",
    "Left",
    "LoRA",
    "LowRank",
    "Right",
    "Running",
    "Step",
    "Target",
    "adapter_bytes",
    "channels_of",
    "from_forge_patch",
    "make_lora",
    "read_adapters",
    "row_order",
    "to_forge_patch",
    "with_channels",
]
