"""Kinds of input, by name. A module for each, imported where its inputs are made."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from tests.fuzz.target import Target

INPUTS: Mapping[str, int] = {
    "prompts": 2000,
    "api": 3000,
    "state_dicts": 5000,
    "safetensors": 5000,
    "pickles": 5000,
    "gguf": 4000,
    "infotext": 4000,
}
"""Name → inputs of a whole run."""


def target(name: str) -> Target:
    found: Target = import_module(f"tests.fuzz.targets.{name}").TARGET
    return found
