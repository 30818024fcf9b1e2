"""What one saved file has of the LoRAs that were active, in one sentence.

The rounding's cost is that of `branch/session/rounding.py`. From 0.1 on a part of what the LoRAs add is lost,
which a close look shows (merged into bf16: 0.17); from 0.5 on most of it, and noise of its size has taken its
place (FP8, NF4: about 1). Below 0.1 (fp16: 0.02) no eye finds it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from lib_precision_lora.branch.session.rounding import Loss, cost_of

PART, MOST = 0.1, 0.5
LISTED = 4
"""LoRAs that are named; of more, how many there are."""

NAMES = {
    "fp8-e4m3fn": "FP8",
    "fp8-e5m2": "FP8 (e5m2)",
    "fp8-e4m3fn-scaled": "scaled FP8",
    "fp8-e5m2-scaled": "scaled FP8 (e5m2)",
    "bnb-nf4": "NF4",
    "bnb-fp4": "FP4",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
    "int8-convrot": "int8 (ConvRot)",
    "int4-convrot": "int4 (ConvRot)",
}


@dataclass(slots=True)
class Saved:
    """sources: the LoRAs, in prompt order; losses: of each parameter that they change; unpacked: how many
    parameters of which packed type were written dense; host_layers: how many the WebUI itself has merged."""

    sources: dict[str, None] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)
    unpacked: Counter[str] = field(default_factory=Counter)
    host_layers: int = 0

    def add(self, other: Saved) -> None:
        self.sources |= other.sources
        self.losses += other.losses
        self.unpacked += other.unpacked
        self.host_layers += other.host_layers

    @property
    def layers(self) -> int:
        return len({loss.name.rpartition(".")[0] for loss in self.losses})

    @property
    def costs(self) -> dict[str, float]:
        """By the type that was written, as people call it, the costliest first."""
        by_type: dict[str, list[Loss]] = {}
        for loss in self.losses:
            by_type.setdefault(type_name(loss.kind), []).append(loss)
        costs = {name: cost_of(losses) for name, losses in by_type.items()}
        return dict(sorted(costs.items(), key=lambda item: -item[1]))

    @property
    def most_is_lost(self) -> bool:
        return max(self.costs.values(), default=0.0) >= MOST

    @property
    def sentence(self) -> str:
        return " ".join(filter(None, [self._merged(), self._cost(), self._unpacked(), self._by_the_host()]))

    def _merged(self) -> str:
        names = list(self.sources)
        listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if names[LISTED:] else "")
        loras, layers = _count(len(names), "LoRA"), _count(self.layers, "layer")
        return f"Saved with {loras} ({listed}) merged into {layers}."

    def _cost(self) -> str:
        costs = self.costs
        names = ", ".join(f"{name} {percent(cost)}" for name, cost in costs.items())
        one = next(iter(costs)) if len(costs) == 1 else None
        subject = f"Rounding to {one}" if one else "Rounding"
        text = f"{subject} costs {percent(cost_of(self.losses))} of what they add"
        largest = max(costs.values())
        if largest < PART:
            return f"{text}."
        text += "" if one else f" ({names})"
        worst = max(self.losses, key=lambda loss: loss.cost)
        where = f"(worst: {percent(worst.cost)} in {worst.name.rpartition('.')[0]})"
        if largest < MOST:
            return f"{text}: a part of it is lost {where}."
        return (
            f"{text}: most of it is lost {where}. Choose a wider type under Diffusion in Low Bits, or a "
            "checkpoint in a wider type, before saving."
        )

    def _unpacked(self) -> str:
        if not self.unpacked:
            return ""
        weights = " and ".join(_count(count, f"{name} weight") for name, count in self.unpacked.items())
        return f"The file holds {weights} unpacked, since it cannot hold {' or '.join(self.unpacked)}."

    def _by_the_host(self) -> str:
        if not self.host_layers:
            return ""
        return f"{_count(self.host_layers, 'more layer')} had been merged by the WebUI itself."


def type_name(kind: str) -> str:
    """A stored weight's kind as people call it."""
    return NAMES.get(kind, kind.removeprefix("dense-"))


def percent(share: float) -> str:
    """`0.1664` → "17 %"."""
    if share < 0.001:
        return "less than 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
