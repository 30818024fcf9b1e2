"""Whether a checkpoint and LoRAs fit a card, from the files' headers alone; nothing here imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib_precision_lora.memory.architecture import Architecture, Request
from lib_precision_lora.memory.budget import Plan, plan_budget
from lib_precision_lora.memory.checkpoint import MODEL, Checkpoint, read_checkpoint
from lib_precision_lora.memory.held import Storage
from lib_precision_lora.memory.host_estimate import host_inference_bytes
from lib_precision_lora.memory.lora_footprints import Plain, factor_sizes, workspace_bytes
from lib_precision_lora.memory.lora_header import LoraHeader, read_lora_header
from lib_precision_lora.memory.naming import Places
from lib_precision_lora.report.quantities import mebibytes

DRIVER_BYTES = 512 * 2**20
"""What driver, CUDA context and desktop are taken to need of a card whose free memory is not given."""

SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asks about. inference_bytes, free_bytes, text_tokens, cfg: None where estimated; compute:
    the setting of that name."""

    model: Path
    loras: tuple[Path, ...]
    card_bytes: int
    width: int = 1024
    height: int = 1024
    batch: int = 1
    storage: Storage = "as-is"
    compute: str = "auto"
    margin_bytes: int = 0
    free_bytes: int | None = None
    inference_bytes: int | None = None
    text_tokens: int | None = None
    cfg: float | None = None


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """held_bytes: on the card while images are made; None for what is not there then."""

    name: str
    stored: str
    parameters: int
    file_bytes: int
    held_bytes: int | None


@dataclass(frozen=True, slots=True)
class LoraRow:
    """layers: for the diffusion model; card_bytes: of their factors; unmatched: those of no known layer."""

    path: str
    file_bytes: int
    layers: int
    text_layers: int
    kinds: dict[str, int]
    ranks: dict[int, int]
    card_bytes: int
    unmatched: tuple[str, ...]
    unknown_keys: int


@dataclass(frozen=True, slots=True)
class Budget:
    """The bytes that the plan was made from; factor_bytes: before the allocator's rounding."""

    base_bytes: int
    factor_bytes: int
    workspace_bytes: int
    inference_bytes: int
    margin_bytes: int
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PlanReport:
    """estimated: whether inference_bytes is the host's estimate; notes: what may make the plan wrong."""

    wish: Wish
    architecture: Architecture
    layout: str
    components: tuple[ComponentRow, ...]
    loras: tuple[LoraRow, ...]
    request: Request
    budget: Budget
    plan: Plan
    estimated: bool
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether it runs, be it with a part of the LoRAs or of the base in RAM."""
        offloaded: int = self.plan.offloaded_bytes
        return self.plan.placement != "refused" and offloaded <= self.budget.base_bytes

    @property
    def verdict(self) -> str:
        """One sentence: whether it runs, and how."""
        plan, base = self.plan, self.budget.base_bytes
        if not self.fits:
            if plan.placement == "refused":
                return (
                    f"Does not fit: the LoRAs need {mebibytes(plan.peak_bytes)} at least, beside the "
                    f"{mebibytes(self.budget.inference_bytes)} of the generation itself."
                )
            return "Does not fit: the generation itself needs more than the card has, without any LoRA."
        how = "stay on the card"
        if plan.placement == "streamed":
            how = f"are streamed from RAM layer by layer ({mebibytes(plan.streamed_bytes)}), the rest stays"
        where = "the LoRAs " + how if self.loras else "there are no LoRAs"
        if plan.offloaded_bytes:
            away = f"{mebibytes(plan.offloaded_bytes)} of the {mebibytes(base)} of the model"
            return f"Runs, slower: {where}, and the host keeps {away} in RAM."
        return f"{'Runs' if plan.placement == 'streamed' else 'Fits'}: {where}, and so does the whole model."

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        wish = {name: value for name, value in asdict(self.wish).items() if name not in ("model", "loras")}
        return {
            "fits": self.fits,
            "verdict": self.verdict,
            "model": {
                "path": str(self.wish.model),
                "layout": self.layout,
                "architecture": self.architecture.name,
                "components": [asdict(row) for row in self.components],
            },
            "loras": [asdict(row) for row in self.loras],
            "request": {**wish, "images": self.request.images, "text_tokens": self.request.text_tokens},
            "budget": {**asdict(self.budget), "inference_is_the_hosts_estimate": self.estimated},
            "plan": asdict(self.plan),
            "notes": list(self.notes),
        }


def make_plan(wish: Wish) -> PlanReport:
    """Reads the headers and plans.

    Raises `HeaderError` for a file that cannot be used, `StorageChoiceError` for a storage type that the
    checkpoint cannot be brought to.
    """
    checkpoint = read_checkpoint(wish.model)
    places = Places(checkpoint)
    loras = tuple(read_lora_header(path, places) for path in wish.loras)
    architecture = checkpoint.architecture
    guided = architecture.guided if wish.cfg is None else wish.cfg != 1
    request = Request(
        wish.width,
        wish.height,
        wish.batch * (2 if guided else 1),
        wish.text_tokens or architecture.text_tokens,
    )
    half = wish.compute == "fp16" or (wish.compute == "auto" and architecture.half)
    plain: Plain | None = None
    if wish.compute == "auto" or (wish.compute == "fp16" and architecture.half):
        plain = "F16" if architecture.half else "BF16"
    adapters = [layer for lora in loras for layer in lora.model]
    sizes = factor_sizes(adapters, half, plain)
    inference = wish.inference_bytes
    if inference is None:
        inference = host_inference_bytes(wish.width, wish.height, wish.batch)
    free = max(0, wish.card_bytes - DRIVER_BYTES) if wish.free_bytes is None else wish.free_bytes
    budget = Budget(
        base_bytes=checkpoint.model.held_bytes(wish.storage),
        factor_bytes=sum(sizes),
        workspace_bytes=workspace_bytes(adapters, request, half, plain),
        inference_bytes=inference,
        margin_bytes=wish.margin_bytes,
        free_bytes=free,
        total_bytes=wish.card_bytes,
    )
    return PlanReport(
        wish=wish,
        architecture=architecture,
        layout=checkpoint.layout,
        components=tuple(_component_rows(checkpoint, wish.storage)),
        loras=tuple(_lora_row(lora, half, plain) for lora in loras),
        request=request,
        budget=budget,
        plan=plan_budget(**{**asdict(budget), "factor_bytes": sizes}),
        estimated=wish.inference_bytes is None,
        notes=tuple(_notes(loras, architecture)),
    )


def _component_rows(checkpoint: Checkpoint, storage: Storage) -> Iterator[ComponentRow]:
    for name, component in checkpoint.components.items():
        held = component.held_bytes(storage) if name == MODEL else None
        yield ComponentRow(name, component.stored, component.parameters, component.file_bytes, held)


def _lora_row(lora: LoraHeader, half: bool, plain: Plain | None) -> LoraRow:
    return LoraRow(
        path=str(lora.path),
        file_bytes=lora.nbytes,
        layers=len(lora.model),
        text_layers=len(lora.text),
        kinds=dict(Counter(layer.kind for layer in lora.model)),
        ranks=dict(sorted(Counter(layer.rank for layer in lora.model if layer.rank is not None).items())),
        card_bytes=sum(factor_sizes(lora.model, half, plain)),
        unmatched=lora.unmatched,
        unknown_keys=len(lora.unknown),
    )


def _notes(loras: Sequence[LoraHeader], architecture: Architecture) -> Iterator[str]:
    """One sentence each: layers of no known name, or of another shape than the checkpoint's."""
    for lora in loras:
        unmatched = lora.unmatched
        if unmatched and len(unmatched) == len(lora.model):
            yield (
                f"{lora.path}: none of its {len(unmatched)} layers is known by name in {architecture.name}; "
                "it may have been trained for another model."
            )
        elif unmatched:
            yield f"{lora.path}: {len(unmatched)} layers are of no known name: {_some(unmatched)}."
        wrong = [layer.name for layer in lora.model if not layer.fits_its_place]
        if wrong:
            yield (
                f"{lora.path}: {len(wrong)} layers have another shape than {architecture.name}'s, it was "
                f"trained for another model: {_some(wrong)}."
            )


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
