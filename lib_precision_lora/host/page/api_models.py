"""What the API answers, for its documentation at /docs."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Problem(BaseModel):
    detail: str = Field(description="What is wrong, in a sentence")


class File(BaseModel):
    name: str = Field(description="As in the prompt")
    strength: float = Field(description="Asked for in the diffusion model, summed where it is there twice")
    text_strength: float = Field(description="Asked for in the text encoders, summed")
    unet_strengths: list[float] = Field(
        [], description="Those that layers of the diffusion model have, where another extension changed them"
    )
    text_strengths: list[float] = Field([], description="Those that layers of the text encoders have, so")
    kinds: str = Field(description="Kinds with their ranks, and how many layers have them")
    ranks: list[int]
    alphas: list[float] = Field(description="As the file gives them")
    unet_layers: int = Field(description="Layers of the diffusion model that it changes")
    text_layers: int = Field(description="Layers of the text encoders that it changes")
    host_layers: int = Field(description="Those among them that went the WebUI's own way")
    unmatched: list[str] = Field(description="Keys that belong to no layer")
    findings: list[str] = Field([], description="What of the file is not used, or disagrees with its header")
    problem: str | None = Field(description="Why it was left out whole; null where it was applied")
    digest: str = Field("", description="SHA-256 of the file as it was read; empty where it was not")


class Generation(BaseModel):
    files: list[File]
    patcher: str = Field(description="Who applied them: Precision LoRA, or the WebUI")
    compute: str = Field(description="Compute mode in effect")
    text_encoders: bool = Field(description="False where the setting leaves these alone")
    low_bits: str | None = Field(description='"Diffusion in Low Bits" in effect')
    stored: dict[str, int] = Field(description="Kind of stored weight, and how many weights are of it")
    products: dict[str, int] = Field(
        {},
        description="How layers that can multiply in two ways do so (quantized, with a quantized input, or "
        "dequantized), and how many",
    )
    planned_bytes: int | None = Field(description="LoRA factors on the device, as planned")
    measured_bytes: int | None = Field(description="LoRA factors on the device, as they stand there")
    streamed_bytes: int | None = Field(None, description="LoRA factors that wait in RAM, and are streamed")
    extra_bytes: int | None = Field(
        None, description="The device's largest use beyond the same generation without LoRAs, as planned"
    )
    peak_bytes: int | None = Field(
        None,
        description="The card's largest use in this generation, all included; on CUDA alone, and null where "
        "an earlier one of the same task on the page took as much",
    )
    attach_seconds: float
    step_seconds: float | None = Field(
        None,
        description="One pass of the diffusion model: the second of the last image, or the only one; a step "
        "of sampling may take several. null where none was measured (CPU and CUDA alone)",
    )
    overhead_seconds: float | None = Field(None, description="Of step_seconds, what LoRAs take")
    problems: list[str]
    finished: bool = Field(description="False where the user or an error ended it before its end")


class Status(BaseModel):
    version: str
    active: bool = Field(description="False where this WebUI is none that the extension knows")
    enabled: bool = Field(description="The setting")
    compute: str = Field(description="The setting")
    last_generation: Generation | None


class Layer(BaseModel):
    name: str
    kind: str
    rank: int | None
    alpha: float | None
    nbytes: int


class Inspection(BaseModel):
    name: str = Field(description="As asked for")
    nbytes: int = Field(description="Of the file")
    layout: str = Field(description="Whose naming it has")
    kinds: dict[str, int] = Field(description="Kind, and how many layers have it")
    ranks: dict[int, int]
    alphas: dict[float, int]
    layers: list[Layer]
    unmatched: list[str] = Field(description="Keys that are not understood")
    findings: list[str] = Field(description="Why it, or a part of it, cannot be applied")


class ModelPlan(BaseModel):
    placement: Literal["resident", "streamed", "refused"] = Field(
        description="Factors on the card, streamed from RAM in part or whole, or no room for any of them"
    )
    peak_bytes: int = Field(description="The card's largest use beyond the same generation without LoRAs")
    reserve_bytes: int = Field(description="What the WebUI would be asked to keep free")
    resident_bytes: int = Field(description="Factors that stay on the card")
    streamed_bytes: int = Field(description="Factors that are streamed from RAM")
    offloaded_bytes: int = Field(description="Of the checkpoint, what has to stay in RAM")
    advice: list[str] = Field(description="The cheapest ways to a better placement, the cheapest first")
    left_out: list[str] = Field(description="LoRAs that do not fit beside those before them")


class LoraPlan(BaseModel):
    diffusion_model: ModelPlan
    text_encoder: ModelPlan | None = Field(description="null where the checkpoint has none")
    together: ModelPlan = Field(
        description="Factors and the checkpoint's bytes in RAM of both; peak and reserve with one model at "
        "work at a time"
    )
