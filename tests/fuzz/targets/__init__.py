"""What is fuzzed, by name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.fuzz.target import Target
from tests.fuzz.targets import gguf, pickles, safetensors

TARGETS: Mapping[str, Target] = {
    target.name: target for target in (safetensors.TARGET, pickles.TARGET, gguf.TARGET)
}
