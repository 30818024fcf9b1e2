"""The sentence about a saved file: what was merged, what the rounding costs, and what to do about it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lib_precision_lora.branch.session.rounding import Loss
from lib_precision_lora.report.saved import Saved, percent


def saved(*losses: Loss, names: str = "a", **counts: Any) -> Saved:
    return Saved(dict.fromkeys(names.split()), list(losses), **counts)


def loss(cost: float, kind: str = "dense-fp16", name: str = "block.0.weight", change: float = 1.0) -> Loss:
    return Loss(name, kind, cost**2 * change, change)


@pytest.mark.parametrize(
    ("cost", "kind", "sentence"),
    [
        (0.0, "dense-fp32", "Rounding to fp32 costs less than 0.1 % of what they add."),
        (0.0208, "dense-fp16", "Rounding to fp16 costs 2.1 % of what they add."),
        (
            0.166,
            "dense-bf16",
            "Rounding to bf16 costs 17 % of what they add: a part of it is lost (worst: 17 % in block.0).",
        ),
        (
            1.08,
            "bnb-nf4",
            "Rounding to NF4 costs 108 % of what they add: most of it is lost (worst: 108 % in block.0). "
            "Choose a wider type under Diffusion in Low Bits, or a checkpoint in a wider type, before "
            "saving.",
        ),
    ],
)
def test_what_the_rounding_costs_decides_what_is_said_of_it(cost: float, kind: str, sentence: str) -> None:
    result = saved(loss(cost, kind))
    assert result.sentence == f"Saved with 1 LoRA (a) merged into 1 layer. {sentence}"
    assert result.most_is_lost == (kind == "bnb-nf4")


def test_of_several_types_one_that_loses_most_is_named_however_small_its_part() -> None:
    result = saved(loss(0.02, name="te.weight", change=100.0), loss(1.0, "fp8-e4m3fn"))
    assert result.most_is_lost
    assert (
        "Rounding costs 10 % of what they add (FP8 100 %, fp16 2.0 %): most of it is lost" in result.sentence
    )
    assert "(worst: 100 % in block.0)" in result.sentence


def test_layers_are_counted_once_and_many_loras_are_not_all_named() -> None:
    result = saved(
        loss(0.0), loss(0.0, name="block.0.bias"), loss(0.0, name="block.1.weight"), names="a b c d e f"
    )
    assert result.sentence.startswith("Saved with 6 LoRAs (a, b, c, d and 2 more) merged into 2 layers.")


def test_parts_of_one_file_add_up_and_what_else_is_in_it_is_said() -> None:
    result = saved(loss(0.0))
    result.add(saved(loss(0.0, name="te.0.weight"), names="b a", unpacked=Counter(GGUF=3), host_layers=1))
    assert result.sentence == (
        "Saved with 2 LoRAs (a, b) merged into 2 layers. Rounding to fp16 costs less than 0.1 % of what they "
        "add. The file holds 3 GGUF weights unpacked, since it cannot hold GGUF. 1 more layer had been "
        "merged by the WebUI itself."
    )


def test_percentages_have_two_digits_where_they_are_small() -> None:
    assert [percent(share) for share in (0.0, 0.00099, 0.001, 0.0207, 0.0996, 0.166, 1.076)] == [
        "less than 0.1 %",
        "less than 0.1 %",
        "0.1 %",
        "2.1 %",
        "10 %",
        "17 %",
        "108 %",
    ]
