"""Whose code applies a generation's LoRAs, and how it computes: overridden for that one generation."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_precision_lora.host.generation.override import Override
from lib_precision_lora.ui.choices import FP16_LORA
from lib_precision_lora.ui.settings import COMPUTE, ENABLED
from tests.host.jobs import FP8, Jobs, start_jobs
from tests.host.lora_files import Active, LoraFile, exact_output, make_lora, prompt
from tests.host.observers import branches, log_lines
from tests.host.webui import Host

EXACT = 1e-5
MERGE, ONLINE = Override(patcher="stock Forge merge"), Override(patcher="stock Forge (fp16 LoRA)")
LOW = "float8-e4m3fn"


@pytest.fixture
def jobs(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    return start_jobs(host, tmp_path, monkeypatch)


@pytest.fixture
def cats(host: Host) -> LoraFile:
    lora = make_lora("cats")
    lora.write(host)
    return lora


def error(jobs: Jobs, p: Any, *active: Active, stored: bool = False) -> float:
    """`‖y − exact‖ / ‖exact‖` of the last pass."""
    exact: Tensor = exact_output(jobs.host.current, "a cat", list(active), stored)
    return float((p.outputs[-1].double() - exact).norm() / exact.norm())


def test_a_compute_mode_is_that_generations_alone(jobs: Jobs, cats: LoraFile) -> None:
    text = prompt("a cat", Active(cats))
    errors, encodes = {}, []
    for mode in ("fp16", "fp32", "as set above", "fp16"):
        encoded = jobs.host.current.encodes if encodes else 0
        p = jobs.run(text, Override(compute=mode))
        errors[mode] = error(jobs, p, Active(cats))
        encodes.append(jobs.host.current.encodes - encoded)
    assert errors["fp32"] < EXACT
    assert errors["as set above"] < EXACT
    assert 10 * errors["fp32"] < errors["fp16"] < 5e-3
    assert all(encodes), "the text encoder's branch computes in the new mode too"
    assert len(jobs.loads) == 1


def test_automatic_is_automatic_though_the_user_has_set_another(jobs: Jobs, cats: LoraFile) -> None:
    jobs.host.set_option(COMPUTE, "fp16")
    text = prompt("a cat", Active(cats))
    assert error(jobs, jobs.run(text), Active(cats)) > 10 * EXACT
    assert error(jobs, jobs.run(text, Override(compute="Automatic")), Active(cats)) < EXACT
    assert error(jobs, jobs.run(text, Override()), Active(cats)) > 10 * EXACT


def test_stock_merges_once_and_ours_is_back_at_the_next_generation(jobs: Jobs, cats: LoraFile) -> None:
    text, active = prompt("a cat", Active(cats)), Active(cats)
    for override in (None, MERGE, None, None, MERGE, MERGE, None):
        p = jobs.run(text, override)
        model = jobs.host.current.model
        assert error(jobs, p, active, stored=override is MERGE) < EXACT
        assert error(jobs, p, active, stored=override is not MERGE) > 1e-3
        assert bool(branches(model)) is (override is None)
        assert bool(jobs.host.contract.merged(jobs.host.current)) is (override is MERGE)
    assert jobs.host.args.dynamic_args["online_lora"] is False
    assert len(jobs.loads) == 1


def test_stock_with_fp16_loras_keeps_them_online(jobs: Jobs, cats: LoraFile) -> None:
    jobs.select(low_bits=LOW)
    text = prompt("a cat", Active(cats))
    expected = {None: (False, False), MERGE: (True, False), ONLINE: (False, True)}
    for override in (ONLINE, None, ONLINE, MERGE, ONLINE, None):
        p = jobs.run(text, override)
        contract, checkpoint = jobs.host.contract, jobs.host.current
        found = bool(contract.merged(checkpoint)), bool(contract.online(checkpoint))
        assert found == expected[override], override
        if override is None:
            assert error(jobs, p, Active(cats)) < EXACT
    assert jobs.loads == [("first.safetensors", FP8)]
    assert jobs.host.args.dynamic_args["online_lora"] is False


def test_a_nested_generation_by_stock_leaves_the_outer_one_ours(jobs: Jobs, cats: LoraFile) -> None:
    text, active = prompt("a cat", Active(cats)), Active(cats)

    def nest(p: Any) -> None:
        assert error(jobs, p, active) < EXACT
        inner = jobs.run(text, MERGE)
        assert error(jobs, inner, active, stored=True) < EXACT

    outer = jobs.run(text, during=nest, n_iter=2)
    assert len(outer.outputs) == 2
    assert not jobs.host.contract.merged(jobs.run(text).sd_model)


def test_without_a_lora_in_the_prompt_stock_leaves_nothing_on(jobs: Jobs, cats: LoraFile) -> None:
    jobs.run(prompt("a cat", Active(cats)))
    for override in (MERGE, ONLINE):
        assert error(jobs, jobs.run("a cat", override)) < EXACT
        assert branches(jobs.host.current.model) == 0


def test_the_fp16_lora_variants_mean_the_same_as_the_plain_ones(jobs: Jobs, cats: LoraFile) -> None:
    text = prompt("a cat", Active(cats))
    with log_lines(logging.INFO) as lines:
        done = [
            jobs.run(text, Override(low_bits))
            for low_bits in (LOW, f"{LOW} (fp16 LoRA)", LOW, f"{LOW} (fp16 LoRA)")
        ]
        jobs.select(low_bits=f"{LOW} (fp16 LoRA)")
        done.append(jobs.run(text))
    assert all(torch.equal(p.outputs[-1], done[0].outputs[-1]) for p in done)
    assert jobs.host.contract.online(jobs.host.current) == 0
    assert jobs.loads == [("first.safetensors", FP8)]
    assert lines.count(FP16_LORA) == 1
    assert [FP16_LORA in p.comments for p in done] == [False, True, False, False, False]


def test_with_the_extension_off_a_variant_is_the_hosts(jobs: Jobs, cats: LoraFile) -> None:
    jobs.host.set_option(ENABLED, False)
    text = prompt("a cat", Active(cats))
    with log_lines(logging.INFO) as lines:
        for low_bits, online in ((LOW, False), (f"{LOW} (fp16 LoRA)", True), (LOW, False)):
            jobs.run(text, Override(low_bits))
            assert bool(jobs.host.contract.online(jobs.host.current)) is online
    assert not [line for line in lines if "changes nothing" in line]


def test_conditioning_is_computed_anew_where_the_storage_type_changes(jobs: Jobs, cats: LoraFile) -> None:
    """As the host does it where the user changes it; otherwise what is cached is used."""
    jobs.run("a dog")
    for text in ("a cat", prompt("a cat", Active(cats))):
        for override, computed in (
            (None, True),
            (None, False),
            (Override(LOW), True),
            (Override(LOW), False),
        ):
            former, before = jobs.host.current, jobs.host.current.encodes
            jobs.run(text, override)
            engine = jobs.host.current
            assert (engine.encodes > (before if engine is former else 0)) is computed, (text, override)
