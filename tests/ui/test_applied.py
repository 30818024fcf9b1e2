"""What a generation applied, as the page shows it: read back with a parser of HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lib_precision_lora.host.generation.report import FileReport, GenerationReport
from lib_precision_lora.ui.applied import NONE, SHOWN_KEYS, applied_html

CATS = FileReport("cats", 0.8, 0.5, "32 × lora rank 8", (8,), (4.0,), 30, 2)
BAD = FileReport("bad", 1.0, 1.0, problem="LoRA bad was left out: it holds no tensors")
REPORT = GenerationReport(
    files=(CATS, BAD),
    patcher="Precision LoRA",
    compute="fp16",
    low_bits="bnb-nf4",
    stored={"bnb-nf4": 30, "dense-fp16": 3},
    attach_seconds=0.25,
    problems=("LoRA bad was left out: it holds no tensors",),
)


class Reader(HTMLParser):
    """Text by element, styles of bars, and whether every element is closed in its order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.append(tag)
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


@pytest.mark.parametrize(
    ("unet", "text", "shown"),
    [
        ((), (), "Strength 0.8 ( text encoder 0.5) Kind"),
        ((0.2, 0.5, 1.0), (), "Strength 0.8, by layer 0.2 … 1 ( text encoder 0.5) Kind"),
        ((), (0.25,), "Strength 0.8 ( text encoder 0.5, by layer 0.25) Kind"),
    ],
)
def test_strengths_that_layers_have_stand_beside_the_one_that_was_asked_for(
    unet: tuple[float, ...], text: tuple[float, ...], shown: str
) -> None:
    cats = replace(CATS, unet_strengths=unet, text_strengths=text)
    words = " ".join(Reader(applied_html(replace(REPORT, files=(cats,)))).words)
    assert shown in words.replace("  ", " ")


def test_it_says_what_was_applied_and_what_was_left_out_and_why() -> None:
    words = Reader(applied_html(REPORT)).words
    text = " ".join(words)
    assert "LoRAs applied 1 left out 1" in text.replace("  ", " ")
    assert "cats Strength 0.8 ( text encoder 0.5) Kind 32 × lora rank 8 Alpha 4" in text.replace("  ", " ")
    assert "30 model , 2 text encoder" in text
    assert "bad Left out LoRA bad was left out: it holds no tensors" in text
    assert "Compute mode fp16 Diffusion in Low Bits bnb-nf4" in text
    assert "30 × bnb-nf4, 3 × dense-fp16" in words
    assert "250.0 ms" in words


def test_ways_of_multiplying_are_told_where_there_is_more_than_one() -> None:
    both = Reader(applied_html(replace(REPORT, products={"quantized": 40, "dequantized": 2})))
    text = " ".join(both.words).replace("  ", " ")
    assert "Products with the base 40 × quantized , 2 × dequantized Time to attach" in text
    assert "Products with the base" not in Reader(applied_html(REPORT)).words


def test_text_encoders_are_spoken_of_where_a_setting_leaves_them_alone() -> None:
    said = [" ".join(Reader(applied_html(replace(REPORT, text_encoders=on))).words) for on in (True, False)]
    assert ["left alone, as set in Settings" in text for text in said] == [False, True]


def test_what_comes_from_a_file_is_text_and_nothing_else() -> None:
    attack = "<img src=x onerror=alert(1)>\"'&"
    hostile = FileReport(attack, 1.0, 1.0, attack, unmatched=(attack,), findings=(attack,))
    left_out = FileReport(attack, 1.0, 1.0, problem=attack)
    report = GenerationReport(
        (hostile, left_out), attack, attack, True, attack, {attack: 1}, problems=("other " + attack,)
    )
    read = Reader(applied_html(report))
    assert "img" not in read.tags
    assert sum(attack in word for word in read.words) == 10


def test_memory_has_a_bar_for_each_figure_and_none_without() -> None:
    assert Reader(applied_html(REPORT)).styles == []
    both = Reader(applied_html(replace(REPORT, planned_bytes=3 * 2**20, measured_bytes=4 * 2**20)))
    assert both.styles == ["width: 75.0%", "width: 100.0%"]
    assert {"3.0 MiB", "4.0 MiB"} <= set(both.words)
    one = Reader(applied_html(replace(REPORT, measured_bytes=0)))
    assert one.styles == ["width: 0.0%"]


def test_the_cost_per_step_is_told_with_its_part_of_the_step_where_it_was_measured() -> None:
    text = " ".join(
        Reader(applied_html(replace(REPORT, step_seconds=0.35, overhead_seconds=0.013))).words
    ).replace("  ", " ")
    assert "Time per model pass 350.0 ms, of them for LoRAs 13.0 ms (3.7 %)" in text
    for step in ({}, {"step_seconds": 0.35}, {"overhead_seconds": 0.013}):
        assert "Time per model pass" not in Reader(applied_html(replace(REPORT, **step))).words


def test_what_is_streamed_and_the_predicted_peak_stand_under_the_bars() -> None:
    placed = replace(REPORT, planned_bytes=2**20, measured_bytes=2**20)
    text = " ".join(
        Reader(applied_html(replace(placed, streamed_bytes=5 * 2**20, extra_bytes=7 * 2**20))).words
    )
    assert "Streamed from RAM 5.0 MiB Predicted peak for LoRAs 7.0 MiB" in text.replace("  ", " ")
    for none in (None, 0):
        words = Reader(applied_html(replace(placed, streamed_bytes=none, extra_bytes=none))).words
        assert not {"Streamed from RAM", "Predicted peak for LoRAs"} & set(words)


def test_a_long_list_of_keys_is_cut() -> None:
    keys = tuple(f"key{index}" for index in range(SHOWN_KEYS + 5))
    read = Reader(applied_html(replace(REPORT, files=(replace(CATS, unmatched=keys),))))
    assert read.tags.count("li") == SHOWN_KEYS + 1
    assert "25" in read.words
    assert "…" in read.words


def test_a_generation_that_ended_with_an_error_is_said_to_be_unfinished() -> None:
    text = "The generation did not finish. Until then:"
    assert text in Reader(applied_html(replace(REPORT, finished=False))).words
    assert text not in Reader(applied_html(REPORT)).words


def test_loras_that_the_webui_applied_are_not_said_to_be_ours() -> None:
    read = Reader(applied_html(replace(REPORT, patcher="WebUI", files=(replace(CATS, kinds=""),))))
    assert "LoRAs left to the WebUI" in read.words
    assert "LoRAs applied" not in read.words
    assert "Time to attach" not in read.words


def test_nothing_applied_is_said() -> None:
    assert NONE in Reader(applied_html(GenerationReport(patcher="Precision LoRA"))).words


@pytest.mark.parametrize("report", [REPORT, GenerationReport()])
def test_a_report_goes_through_json_unharmed(report: GenerationReport) -> None:
    value = report.to_json()
    assert json.loads(json.dumps(value)) == value
    assert [file["name"] for file in value["files"]] == [file.name for file in report.files]
