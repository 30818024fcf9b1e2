"""What is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.target import Target
from tests.fuzz.targets import gguf, pickles, safetensors, state_dicts

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (state_dicts.TARGET, safetensors.TARGET, pickles.TARGET, gguf.TARGET)
}
