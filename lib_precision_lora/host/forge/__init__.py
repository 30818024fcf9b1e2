"""Forge: what is swapped in it, and what it must have."""

from lib_precision_lora.host.forge.host import ForgeHost
from lib_precision_lora.host.forge.requirements import REQUIREMENTS

__all__ = ["REQUIREMENTS", "ForgeHost"]
