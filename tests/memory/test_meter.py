"""The meter counts what operators allocate, once, and while it lives."""

from __future__ import annotations

import pytest
import torch

from lib_precision_lora.memory.meter import ByteMeter, PeakMeter
from tests.memory.card_statistics import CardStatistics

KIBIBYTE = 1024


def test_a_new_tensor_counts_until_it_is_gone() -> None:
    meter = ByteMeter()
    with meter:
        first = torch.zeros(KIBIBYTE, dtype=torch.uint8)
        del first
        second = torch.zeros(3 * KIBIBYTE, dtype=torch.uint8)
    assert (meter.live, meter.peak) == (3 * KIBIBYTE, 3 * KIBIBYTE)
    del second
    assert meter.live == 0


def test_tensors_that_live_together_add_up() -> None:
    meter = ByteMeter()
    with meter:
        both = torch.zeros(KIBIBYTE), torch.zeros(KIBIBYTE, dtype=torch.float64)
    assert meter.peak == 12 * KIBIBYTE == sum(part.nbytes for part in both)


def test_views_and_in_place_results_count_once() -> None:
    meter = ByteMeter()
    with meter:
        whole = torch.zeros(KIBIBYTE)
        whole[::2].add_(1)
        whole.view(32, 32).T.mul_(2)
    assert meter.peak == 4 * KIBIBYTE


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(KIBIBYTE)
    meter = ByteMeter()
    with meter:
        before.add_(1).view(32, 32)
    assert meter.peak == 0


CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> CardStatistics:
    return CardStatistics(monkeypatch, in_use=10, peak=1000)


def test_a_peak_is_measured_from_its_own_start(card: CardStatistics) -> None:
    meter = PeakMeter(CARD, reset=True)
    assert meter.read() == 10, "what stands there"
    card.use(300)
    card.use(20)
    assert meter.read() == 300
    assert PeakMeter(CARD, reset=True).read() == 20


def test_nobody_elses_statistics_are_reset_and_a_peak_that_they_hide_is_not_known(
    card: CardStatistics,
) -> None:
    meter = PeakMeter(CARD, reset=False)
    card.use(300)
    assert (card.resets, meter.read()) == (0, None)
    card.use(1001)
    assert meter.read() == 1001
    second = PeakMeter(CARD, reset=False)
    card.use(400)
    assert second.read() is None
    card.reset()  # by its owner, meanwhile
    card.use(500)
    assert second.read() == 500


def test_a_processor_has_no_peak() -> None:
    assert PeakMeter(torch.device("cpu"), reset=True).read() is None
