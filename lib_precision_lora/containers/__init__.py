"""LoRA files read as data: weights only, nothing run, nothing allocated that the file does not hold."""

from lib_precision_lora.containers.content import ContainerError, LoraContent, PickleError
from lib_precision_lora.containers.read import read_lora, read_open

__all__ = ["ContainerError", "LoraContent", "PickleError", "read_lora", "read_open"]
