"""What a generation applied: plain values, for the page, the log and the API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FileReport:
    """One LoRA of the prompt, however often it is in there.

    strength and text_strength: asked for in the diffusion model and in the text encoders, each the sum of all
    entries; kinds: "32 × lora rank 8, …"; ranks and alphas: those that occur, alphas as the file gives them;
    unet_layers and text_layers: how many of each are changed; host_layers: those among them that went the
    WebUI's own way; unet_strengths and text_strengths: those that the layers have, ascending, where these are
    not what was asked for (another extension has changed them), else none; unmatched: keys without a layer;
    findings: what people should know of it; problem: why it was left out whole, or None; digest: SHA-256 of
    the bytes that were read, empty where we have read none.
    """

    name: str
    strength: float
    text_strength: float
    kinds: str = ""
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    unet_layers: int = 0
    text_layers: int = 0
    host_layers: int = 0
    unet_strengths: tuple[float, ...] = ()
    text_strengths: tuple[float, ...] = ()
    unmatched: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    problem: str | None = None
    digest: str = ""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """All LoRAs of a generation, in prompt order, those of a hires pass after those of the first.

    patcher: who applied them; compute: the mode in effect; text_encoders: False where the setting leaves
    these alone; low_bits: the name under "Diffusion in Low Bits" in effect, None where it is not known;
    stored: how the diffusion model's weights lie in memory, kind → number; products: of the layers that can
    multiply them in two ways, "quantized" or "dequantized" → number; planned_bytes and measured_bytes:
    LoRA factors on the device, None where nothing was planned; streamed_bytes: those that wait in RAM;
    extra_bytes: the device's largest use beyond the same generation without LoRAs, predicted; peak_bytes: its
    largest use since the generation began, all included, None without a CUDA device, and where one before it
    has hidden it; attach_seconds: time spent on following the prompt's LoRAs; step_seconds: one forward of
    the diffusion model, the second of the last pass (the first, where there was one); overhead_seconds: of it
    the branches; both None where nothing was measured; problems: sentences; finished: False where the
    generation was ended before its time, by the user or by an error.
    """

    files: tuple[FileReport, ...] = ()
    patcher: str = ""
    compute: str = ""
    text_encoders: bool = True
    low_bits: str | None = None
    stored: Mapping[str, int] = dataclasses.field(default_factory=dict)
    products: Mapping[str, int] = dataclasses.field(default_factory=dict)
    planned_bytes: int | None = None
    measured_bytes: int | None = None
    streamed_bytes: int | None = None
    extra_bytes: int | None = None
    peak_bytes: int | None = None
    attach_seconds: float = 0.0
    step_seconds: float | None = None
    overhead_seconds: float | None = None
    problems: tuple[str, ...] = ()
    finished: bool = True

    @property
    def applied(self) -> tuple[FileReport, ...]:
        return tuple(file for file in self.files if file.problem is None)

    @property
    def left_out(self) -> tuple[FileReport, ...]:
        return tuple(file for file in self.files if file.problem is not None)

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "files": [
                {
                    name: list(value) if isinstance(value, tuple) else value
                    for name, value in dataclasses.asdict(file).items()
                }
                for file in self.files
            ],
            "stored": dict(self.stored),
            "products": dict(self.products),
            "problems": list(self.problems),
        }
