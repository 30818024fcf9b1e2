"""The plan: never above the card, never less for more, and right about what fits; against a plain search."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_precision_lora.memory import Plan, plan_budget
from lib_precision_lora.memory.allocator import allocated_bytes, reserved_bytes
from lib_precision_lora.memory.placement import choose_resident, streaming_bytes

MIB, GIB = 2**20, 2**30
CARDS = (4, 6, 8, 10, 11, 12, 16, 24, 32, 48)
PARAMETERS = {"SD 1.5": 859_520_964, "SDXL": 2_567_463_684, "Flux": 11_901_408_320}
BITS = {"NF4": 4.5, "FP8": 8.0, "Q8_0": 8.5, "Q4_K": 4.5, "bf16": 16.0}
TEXT_ENCODERS = {"none": 0, "CLIP-L and T5 in FP8": 5_000_000_000, "CLIP-L and T5 in fp16": 9_787_000_000}
SIZES = (512, 1024, 2048)
HIDDEN = 3072
PLACEMENTS = ("resident", "streamed", "refused")


def flux_layers() -> list[tuple[int, int]]:
    """[out, in] of every linear layer in the blocks of Flux: 19 double ones, 38 single ones."""
    qkv, proj = (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN)
    stream = [qkv, proj, (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (6 * HIDDEN, HIDDEN)]
    single = [(7 * HIDDEN, HIDDEN), (HIDDEN, 5 * HIDDEN), (3 * HIDDEN, HIDDEN)]
    return 19 * 2 * stream + 38 * single


def factor_sizes(loras: int, rank: int) -> list[int]:
    """Bytes of down [rank, in] and up [out, rank] in bf16, of every layer and file."""
    return [2 * rank * side for out, width in flux_layers() for side in (out, width)] * loras


def workspace(loras: int, rank: int, size: int) -> int:
    """What a chunk takes, by tokens: fp32 inputs and outputs, and the hidden state; 32 MiB at most."""
    tokens = (size // 16) ** 2 + 512
    return min(32 * MIB, 4 * tokens * (HIDDEN + 7 * HIDDEN + 3 * rank * loras)) if loras else 0


def host_inference(size: int) -> int:
    """Forge's own estimate."""
    return max(GIB, int(1.28 * 2 * (size // 8) ** 2 * 2 * 16384))


def plan(card: int, base: int, factors: int | list[int], work: int, inference: int, **more: int) -> Plan:
    numbers = {"margin_bytes": 0, "free_bytes": card - 512 * MIB, **more}
    return plan_budget(
        base_bytes=base,
        factor_bytes=factors,
        workspace_bytes=work,
        inference_bytes=inference,
        total_bytes=card,
        **numbers,
    )


@pytest.mark.parametrize("card", CARDS)
def test_on_every_card_more_loras_a_higher_rank_or_a_larger_image_never_plan_less(card: int) -> None:
    seen = set()
    for model, stored, encoders, size in product(PARAMETERS, BITS, TEXT_ENCODERS, SIZES):
        base = int(PARAMETERS[model] * BITS[stored] / 8) + TEXT_ENCODERS[encoders]
        peaks = {}
        for loras, rank in product((0, 1, 2, 8), (4, 32, 256)):
            made = plan(
                card * GIB,
                base,
                allocated_bytes(factor_sizes(loras, rank)),
                workspace(loras, rank, size),
                host_inference(size),
            )
            assert made.reserve_bytes <= card * GIB
            peaks[loras, rank] = made
            seen.add(made.placement)
        for (loras, rank), made in peaks.items():
            for (more, higher), other in peaks.items():
                if more >= loras and higher >= rank:
                    assert made.peak_bytes <= other.peak_bytes
                    assert PLACEMENTS.index(made.placement) <= PLACEMENTS.index(other.placement)
    assert {"resident", "streamed"} <= seen or card >= 24


def test_flux_with_eight_files_of_rank_256_needs_more_than_the_smallest_cards_have() -> None:
    """19 · 2 · 4 … by hand: Σ (out + in) over all layers is 5 · 19 · 2 · … elements per unit of rank."""
    per_rank = sum(out + width for out, width in flux_layers())
    assert per_rank == HIDDEN * (19 * 2 * (4 + 2 + 5 + 5 + 7) + 38 * (8 + 6 + 4))
    assert sum(factor_sizes(8, 256)) == 8 * 256 * 2 * per_rank


@st.composite
def budgets(draw: st.DrawFn) -> dict[str, int]:
    total = draw(st.integers(1, 48 * GIB))
    scale = draw(st.sampled_from([1, MIB, GIB, total]))
    number = st.integers(0, 3 * scale)
    return {
        "base_bytes": draw(number),
        "factor_bytes": draw(number),
        "workspace_bytes": draw(number),
        "inference_bytes": draw(number),
        "margin_bytes": draw(number),
        "free_bytes": draw(st.integers(0, 2 * total)),
        "total_bytes": total,
        "streaming_bytes": draw(number),
    }


def fits(given: dict[str, int], resident: int, beside_base: bool) -> bool:
    """Whether so many factors fit on the card: with the buffers of the streamed ones, if there are any."""
    buffers = 0 if resident == given["factor_bytes"] else min(given["factor_bytes"], given["streaming_bytes"])
    used = resident + buffers + given["workspace_bytes"] + given["inference_bytes"] + given["margin_bytes"]
    used += given["base_bytes"] if beside_base else 0
    return used <= min(given["free_bytes"], given["total_bytes"])


@settings(max_examples=400, deadline=None)
@given(budgets())
def test_a_plan_is_what_a_search_over_every_amount_finds(given: dict[str, int]) -> None:
    made = plan_budget(**given)
    factors = given["factor_bytes"]
    if factors + given["workspace_bytes"] == 0:
        assert (made.placement, made.peak_bytes, made.reserve_bytes) == ("resident", 0, 0)
        return
    steps = sorted({0, 1, factors, factors - 1, *(factors * part // 16 for part in range(17))})
    amounts = [amount for amount in steps if 0 <= amount <= factors]
    possible = [amount for amount in amounts if fits(given, amount, beside_base=False)]
    assert (made.placement == "refused") == (not possible)
    if made.placement == "refused":
        return
    assert fits(given, made.resident_bytes, beside_base=False)
    whole = fits(given, factors, beside_base=True)
    whole = whole or (not any(fits(given, amount, True) for amount in amounts) and factors in possible)
    assert (made.placement == "resident") == whole
    assert made.resident_bytes + made.streamed_bytes == factors
    assert made.reserve_bytes == made.peak_bytes + given["margin_bytes"] <= given["total_bytes"]


@settings(max_examples=300, deadline=None)
@given(budgets(), st.integers(0, 8 * GIB), st.sampled_from(["factor_bytes", "workspace_bytes"]))
def test_more_never_plans_less(given: dict[str, int], more: int, what: str) -> None:
    first, second = plan_budget(**given), plan_budget(**{**given, what: given[what] + more})
    assert PLACEMENTS.index(first.placement) <= PLACEMENTS.index(second.placement) or not first.peak_bytes
    assert first.peak_bytes <= second.peak_bytes
    assert second.reserve_bytes <= given["total_bytes"]


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_streaming_everything_keeps_nothing_on_the_card(given: dict[str, int]) -> None:
    made = plan_budget(**given, stream_all=True)
    assert made.resident_bytes == 0
    if made.placement == "streamed":
        assert made.streamed_bytes == given["factor_bytes"] > 0


@settings(max_examples=400, deadline=None)
@given(budgets())
def test_advice_is_short_and_following_it_helps(given: dict[str, int]) -> None:
    made = plan_budget(**given)
    assert len(made.advice) <= 3
    assert all(0 <= int(number) <= 2**20 for line in made.advice for number in re.findall(r"\d+", line))
    if made.placement == "resident":
        return
    assert made.advice
    smaller = re.match(r"use LoRAs that are (\d+) MB smaller", made.advice[0])
    if made.placement == "streamed":
        assert smaller
        less = {**given, "factor_bytes": max(0, given["factor_bytes"] - int(smaller[1]) * MIB)}
        assert plan_budget(**less).placement == "resident"
        return
    for line in made.advice:
        changed = _followed(line, given)
        assert changed is None or _missing(changed) < _missing(given)
    closed = re.search(r"close other programs that use the card: (\d+) MB", " ".join(made.advice))
    if closed and given["total_bytes"] >= given["free_bytes"] + int(closed[1]) * MIB:
        freed = {**given, "free_bytes": given["free_bytes"] + int(closed[1]) * MIB}
        assert plan_budget(**freed).placement != "refused"


@settings(max_examples=400, deadline=None)
@given(budgets())
def test_no_advice_is_of_nothing(given: dict[str, int]) -> None:
    """A margin alone can be set to 0 MB; and no more is missing of what the generation keeps than that."""
    for line in plan_budget(**given).advice:
        assert "GPU Weights to 0 MB" not in line
        numbers = re.findall(r"(?<!to )\b(\d+)\b", line)
        assert all(int(number) > 0 for number in numbers)
        kept = re.search(r"keeps (\d+) MB, of which (\d+) MB are missing", line)
        assert kept is None or int(kept[2]) <= int(kept[1])


@pytest.mark.parametrize(("base", "advised"), [(100 * MIB, False), (3 * GIB, True)])
def test_gpu_weights_are_advised_where_something_is_left_of_the_checkpoint(base: int, advised: bool) -> None:
    """1 GiB of factors is exchanged for as much of the checkpoint, which must have it."""
    made = plan(6 * GIB, base, 6 * GIB - base, 0, GIB)
    assert made.placement == "streamed"
    lines = [line for line in made.advice if "GPU Weights" in line]
    assert bool(lines) is advised
    for line in lines:
        weights = int(re.findall(r"\d+", line)[0]) * MIB
        assert 0 < weights <= base - made.streamed_bytes - made.offloaded_bytes


def _followed(line: str, given: dict[str, int]) -> dict[str, int] | None:
    """The budget after that advice; None where what it changes is not in megabytes alone."""
    margin = re.match(r"set the memory margin to (\d+) MB", line)
    if margin:
        return {**given, "margin_bytes": min(given["margin_bytes"], int(margin[1]) * MIB)}
    return None


def _missing(given: dict[str, int]) -> int:
    """Bytes by which not even the streamed factors fit."""
    least = min(given["factor_bytes"], given["streaming_bytes"]) + given["workspace_bytes"]
    room = min(given["free_bytes"], given["total_bytes"]) - given["inference_bytes"] - given["margin_bytes"]
    return least - room


@pytest.mark.parametrize(
    "name",
    [
        "base_bytes",
        "factor_bytes",
        "workspace_bytes",
        "inference_bytes",
        "margin_bytes",
        "free_bytes",
        "total_bytes",
        "streaming_bytes",
    ],
)
def test_a_negative_number_is_refused(name: str) -> None:
    numbers = dict.fromkeys(
        ["base_bytes", "factor_bytes", "workspace_bytes", "inference_bytes", "margin_bytes", "free_bytes"], 1
    )
    numbers |= {"total_bytes": 1, "streaming_bytes": 1}
    plan_budget(**numbers)
    with pytest.raises(ValueError, match="negative"):
        plan_budget(**{**numbers, name: -1})


@given(st.lists(st.integers(0, 10**9), max_size=30))
def test_a_sequence_of_sizes_counts_as_the_allocator_rounds_it(sizes: list[int]) -> None:
    by_hand = sum((size + 511) // 512 * 512 for size in sizes)
    assert allocated_bytes(sizes) == by_hand
    assert plan(48 * GIB, 0, sizes, MIB, GIB) == plan(48 * GIB, 0, by_hand, MIB, GIB)


@pytest.mark.parametrize(
    ("sizes", "segments"),
    [
        ([], 0),
        ([1], 2 * MIB),
        ([MIB] * 2, 2 * MIB),
        ([MIB] * 3, 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB] * 2, 20 * MIB),
        ([10 * MIB], 10 * MIB),
        ([11 * MIB], 12 * MIB),
        ([1, 5 * MIB, 64 * MIB + 1], 2 * MIB + 20 * MIB + 66 * MIB),
    ],
)
def test_segments_are_those_of_the_caching_allocator(sizes: list[int], segments: int) -> None:
    """Small ones share 2 MiB, those up to 10 MiB share 20 MiB, larger ones are rounded to 2 MiB."""
    assert reserved_bytes(sizes) == segments


@given(st.lists(st.integers(0, 200 * MIB), max_size=20))
def test_a_reservation_holds_its_allocations(sizes: list[int]) -> None:
    assert allocated_bytes(sizes) <= reserved_bytes(sizes) <= 2 * allocated_bytes(sizes) + 22 * MIB


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000)), st.integers(0, 5000))
def test_what_stays_fits_and_nothing_else_would(sizes: dict[str, int], room: int) -> None:
    chosen = choose_resident(sizes, room)
    used = sum(sizes[name] for name in chosen)
    assert used <= room
    assert all(used + size > room for name, size in sizes.items() if name not in chosen)
    assert choose_resident(dict(reversed(sizes.items())), room) == chosen


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000)))
def test_two_layers_are_on_their_way_at_once(sizes: dict[str, int]) -> None:
    pairs = [a + b for i, a in enumerate(sizes.values()) for j, b in enumerate(sizes.values()) if i != j]
    assert streaming_bytes(sizes) == max(pairs, default=sum(sizes.values()))
