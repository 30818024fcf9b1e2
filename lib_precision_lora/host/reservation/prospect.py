"""What the memory plan of some LoRAs would be on the checkpoint that is loaded; nothing is attached or moved.

peak      = Σ resident + max (peak − resident)      over the models, as each runs by itself
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_precision_lora.branch import PatchError
from lib_precision_lora.host.interface import Host
from lib_precision_lora.host.loras.division import source_of
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.loras.loading import NetworkLoader
from lib_precision_lora.host.reservation.planning import ModelPlan, Planning
from lib_precision_lora.memory import Plan

BATCH_ROWS = 2
"""The prompt and the negative prompt of one image."""


class NoCheckpointError(RuntimeError):
    """There is no model to plan for."""


@dataclass(frozen=True, slots=True)
class ModelProspect:
    """plan: with the LoRAs that fit, or that of a refused one where none does; left_out: names, in order."""

    plan: Plan
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prospect:
    """text_encoder: None where the checkpoint has none."""

    diffusion_model: ModelProspect
    text_encoder: ModelProspect | None

    @property
    def together(self) -> ModelProspect:
        """Factors add up; what is used on top, and what is reserved, is that of one model at a time."""
        models = [self.diffusion_model, *([] if self.text_encoder is None else [self.text_encoder])]
        plans = [each.plan for each in models]
        resident = sum(plan.resident_bytes for plan in plans)
        placements = {plan.placement for plan in plans}
        plan = Plan(
            next((each for each in ("refused", "streamed") if each in placements), "resident"),
            resident + max(plan.peak_bytes - plan.resident_bytes for plan in plans),
            max(plan.reserve_bytes for plan in plans),
            resident,
            sum(plan.streamed_bytes for plan in plans),
            sum(plan.offloaded_bytes for plan in plans),
            tuple(dict.fromkeys(line for plan in plans for line in plan.advice)),
        )
        return ModelProspect(plan, tuple(dict.fromkeys(name for each in models for name in each.left_out)))


def foresee(
    host: Host,
    loader: NetworkLoader,
    planning: Planning,
    loras: Sequence[tuple[str, float]],
    text_encoders: bool,
    positions: int | None,
) -> Prospect:
    """planning: with sessions that keep to themselves what they make; loras: names and strengths, in the
    prompt's order; text_encoders: whether they act on these too; positions: of the latent image.

    Raises `NoCheckpointError`, and `FileProblem` for a LoRA that cannot be applied to the checkpoint.
    """
    from modules import sd_models

    engine = sd_models.model_data.get_sd_model()
    if getattr(engine, "forge_objects_original", None) is None:
        raise NoCheckpointError(
            "No checkpoint is loaded: load one, by a generation for example, and ask again"
        )
    kept = host.keep(engine)
    names: dict[str, str] = {}
    for name, strength in loras:
        try:
            path, match = loader.match(engine, name)
        except FileProblem as problem:
            raise FileProblem(f"LoRA {name} would be left out: {problem}") from None
        names[kept.add(path, match, strength, strength if text_encoders else 0.0)] = name
    patchers, required = [kept.unet], [0.0]
    if positions is not None:
        required = [float(kept.unet.model.memory_required((BATCH_ROWS, 4, positions, 1)))]
    if kept.clip is not None:
        patchers.append(kept.clip.patcher)
        required.append(0.0)
    try:
        foreseen = planning.foresee(patchers, required, positions)
    except PatchError as error:
        sentence = str(error)
        for source, name in names.items():
            sentence = sentence.replace(source, name)
        raise FileProblem(f"A LoRA would be left out: {sentence}") from None
    found = []
    for patcher, (decided, refused) in zip(patchers, foreseen, strict=True):
        sources = tuple(dict.fromkeys(source_of(key) for key in host.patches(patcher)))
        found.append(_prospect(decided, refused, sources, names))
    return Prospect(found[0], found[1] if len(found) > 1 else None)


def _prospect(
    decided: ModelPlan, refused: Mapping[str, Plan], sources: Sequence[str], names: Mapping[str, str]
) -> ModelProspect:
    """sources: of this model, in order; names: as asked for, by source. A path is not told."""
    plan, left_out = decided.plan, [source for source in sources if source in decided.left_out]
    if left_out and len(left_out) == len(sources):
        plan = next(iter(refused.values()), dataclasses.replace(plan, placement="refused"))
    advice = (*plan.advice, *(line for each in refused.values() for line in each.advice))
    plan = dataclasses.replace(plan, advice=tuple(dict.fromkeys(advice)))
    return ModelProspect(plan, tuple(dict.fromkeys(names.get(each, Path(each).stem) for each in left_out)))
