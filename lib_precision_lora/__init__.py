"""Precision LoRA: LoRAs computed exactly beside an untouched low-bit base."""

__version__ = "0.1.0"
