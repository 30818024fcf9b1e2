"""Forge Neo: what is swapped in it, and what it must have."""

from lib_precision_lora.host.neo.host import NeoHost
from lib_precision_lora.host.neo.requirements import REQUIREMENTS

__all__ = ["REQUIREMENTS", "NeoHost"]
