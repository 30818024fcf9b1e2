"""The budget: what a patch set needs on the card, what the card has, and what follows. Pure arithmetic.

    room      = free − inference − margin (− base, where the whole base is to fit beside it)
    resident  = factors + workspace                              at most room, else
    streamed  = streaming buffers + workspace + the factors that still fit, else refused

A host can keep base layers in RAM, so that a base that does not fit is no reason to refuse; but it is no
reason to push one out either that fits, while factors can be streamed instead at the same price per byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lib_precision_lora.memory.allocator import allocated_bytes

Placement = Literal["resident", "streamed", "refused"]

STREAM_BUFFER_BYTES = 64 * 2**20
"""What the two layers that are on their way take, where the layers' own sizes are not known."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done with the factors, in bytes.

    placement: all on the card; some or all streamed from RAM layer by layer; or not at all.
    peak_bytes: the largest use of the card beyond the same run without LoRAs. A refused plan says what the
    least would have been.
    reserve_bytes: what the host is asked to keep free; never above the card, 0 where refused.
    resident_bytes: factors that stay on the card; streamed_bytes: those that do not.
    offloaded_bytes: base that the host has to keep in RAM, with or without these factors.
    advice: the cheapest ways to a better placement, the cheapest first.
    """

    placement: Placement
    peak_bytes: int
    reserve_bytes: int
    resident_bytes: int
    streamed_bytes: int
    offloaded_bytes: int
    advice: tuple[str, ...] = ()


def plan_budget(
    *,
    base_bytes: int,
    factor_bytes: int | Sequence[int],
    workspace_bytes: int,
    inference_bytes: int,
    margin_bytes: int,
    free_bytes: int,
    total_bytes: int,
    streaming_bytes: int | None = None,
    stream_all: bool = False,
) -> Plan:
    """The plan for one patch set on one card.

    base_bytes: of the checkpoint, still to be placed; factor_bytes: of all LoRAs, in one sum or as the
    sizes of the allocations, which are then rounded as the allocator does; workspace_bytes: what a forward
    takes beyond the base's own; inference_bytes: the host's reserve for everything else; margin_bytes: the
    user's; free_bytes: with all other models gone; total_bytes: of the card; streaming_bytes: the layers
    that are on the card at once when factors are streamed, `STREAM_BUFFER_BYTES` where None; stream_all:
    keep no factors on the card, as the user may want it.
    Raises `ValueError` for a negative number.
    """
    factors = factor_bytes if isinstance(factor_bytes, int) else allocated_bytes(factor_bytes)
    given = (base_bytes, factors, workspace_bytes, inference_bytes, margin_bytes, free_bytes, total_bytes)
    if min(*given, streaming_bytes or 0) < 0:
        raise ValueError(f"a budget of negative bytes: {given}, {streaming_bytes}")
    buffers = min(factors, STREAM_BUFFER_BYTES if streaming_bytes is None else streaming_bytes)
    available = min(free_bytes, total_bytes)
    if factors + workspace_bytes == 0:
        return Plan("resident", 0, 0, 0, 0, max(0, base_bytes + inference_bytes - available))
    least = buffers + workspace_bytes
    whole = least if stream_all else factors + workspace_bytes
    beside_nothing = available - inference_bytes - margin_bytes
    for room in (beside_nothing - base_bytes, beside_nothing):
        if least > room:
            continue
        peak = min(whole, room)
        resident = 0 if stream_all else factors if whole <= room else room - least
        reserve = min(total_bytes, peak + margin_bytes)
        offloaded = max(0, base_bytes + inference_bytes + reserve - available)
        placement: Placement = "resident" if resident == factors else "streamed"
        advice = _to_do_better(factors - resident, offloaded, base_bytes)
        return Plan(placement, peak, reserve, resident, factors - resident, offloaded, advice)
    advice = _to_run_at_all(least - beside_nothing, least, inference_bytes, margin_bytes)
    return Plan("refused", least, 0, 0, 0, max(0, base_bytes + inference_bytes - available), advice)


def _to_do_better(streamed: int, offloaded: int, base: int) -> tuple[str, ...]:
    advice = []
    if streamed:
        advice.append(
            f"use LoRAs that are {megabytes(streamed)} MB smaller in all (fewer, or of lower rank) to keep "
            "them on the card"
        )
        weights = megabytes_down(base - offloaded - streamed)
        if weights:
            advice.append(
                f"or set GPU Weights to {weights} MB or less, which exchanges streamed LoRA for streamed "
                "checkpoint"
            )
        advice.append("or lower the resolution or the batch size")
    elif offloaded:
        advice += [f"{megabytes(offloaded)} MB of the checkpoint stay in RAM; a smaller one would be faster"]
    return tuple(advice)


def _to_run_at_all(missing: int, least: int, inference: int, margin: int) -> tuple[str, ...]:
    """At most three ways to `missing` bytes more room, those that cost the user least first."""
    advice = []
    if missing <= least:
        advice.append(
            f"use fewer LoRAs, or some of lower rank: the largest layers need {megabytes(missing)} MB less"
        )
    if margin:
        freed = min(margin, missing)
        advice.append(
            f"set the memory margin to {megabytes_down(margin - freed)} MB (now {megabytes(margin)})"
        )
    if missing <= inference:
        advice.append(
            f"lower the resolution or the batch size, or raise GPU Weights: the generation itself keeps "
            f"{megabytes(inference)} MB, of which {megabytes(missing)} MB are missing"
        )
    advice.append(f"close other programs that use the card: {megabytes(missing)} MB more would be enough")
    return tuple(advice[:3])


def megabytes(size: int) -> int:
    """Whole MB (2^20 bytes), rounded up, for people."""
    return -(-size // 2**20)


def megabytes_down(size: int) -> int:
    return max(0, size) // 2**20
