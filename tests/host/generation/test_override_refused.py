"""What cannot be in effect: said once, with the reason, and the generation is as set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lib_precision_lora.host.generation.override import Override, in_effect, low_bits_choices
from lib_precision_lora.host.page import script
from lib_precision_lora.ui.choices import AS_SET, FP16_LORA
from tests.host.headers import NF4, SCALED, write_header
from tests.host.jobs import (
    E4M3,
    FIRST,
    FP8,
    OPTION,
    Jobs,
    chosen_by_the_user,
    start_jobs,
)
from tests.host.observers import log_lines
from tests.host.webui import Host


@pytest.mark.parametrize(
    "asked",
    [
        {"override_settings": {OPTION: "float7"}},
        {"override": Override("float7")},
        {"override": Override(compute="float7")},
        {"override": Override(patcher="float7")},
    ],
)
def test_what_is_not_offered_is_as_set_and_said(
    jobs: Jobs, asked: dict[str, Any], seen: list[Override]
) -> None:
    before = chosen_by_the_user(jobs.host)
    with log_lines() as lines:
        p = jobs.run(during=lambda p: seen.append(in_effect(p)), **asked)
    assert p.storage == [torch.float32]
    assert seen == [Override()]
    assert jobs.loads == []
    assert len(lines) == 1
    assert "'float7'" in lines[0]
    assert list(p.comments) == lines
    assert chosen_by_the_user(jobs.host) == before


def test_what_is_not_offered_takes_no_other_choice_along(jobs: Jobs, seen: list[Override]) -> None:
    """As a page sends it that is open since before the WebUI was updated."""
    p = jobs.new(during=lambda p: seen.append(in_effect(p)))
    script.request_override(p, (True, "float7", "fp32", "x" * 10_000))
    jobs.host.processing.process_images(p)
    assert seen == [Override(compute="fp32")]
    low_bits, patcher = p.comments
    assert low_bits.startswith(f"Diffusion in Low Bits is {AS_SET}: there is no 'float7' here, but ")
    assert patcher.startswith("LoRAs are applied by Precision LoRA: there is no 'xxx")
    assert len(patcher) < 250


def test_the_choices_are_the_hosts_own_after_as_set(host: Host) -> None:
    choices = low_bits_choices()
    assert choices[0] == AS_SET
    assert choices[1:] == list(host.main_entry.forge_unet_storage_dtype_options)
    assert {"Automatic", "float8-e4m3fn"} <= set(choices)


@pytest.mark.parametrize(
    ("file", "asked", "reason"),
    [
        ("flux.gguf", "float8-e4m3fn", "GGUF"),
        ("flux.gguf", "bnb-nf4", "GGUF"),
        ("nf4.safetensors", "float8-e4m3fn", "quantized to NF4"),
        ("nf4.safetensors", "bnb-fp4", "quantized to NF4"),
        ("first.safetensors", "bnb-nf4", "NF4"),
        ("scaled.safetensors", "bnb-fp4", "scales"),
    ],
)
def test_what_a_checkpoint_cannot_take_is_refused_with_the_reason(
    host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    asked: str,
    reason: str,
    seen: list[Override],
) -> None:
    if asked not in low_bits_choices():
        pytest.skip(f"without bitsandbytes this WebUI offers no {asked}: it is as an unknown name")
    write_header(tmp_path / "nf4.safetensors", NF4)
    write_header(tmp_path / "scaled.safetensors", SCALED)
    files = ("flux.gguf", "nf4.safetensors", "scaled.safetensors")
    jobs = start_jobs(host, tmp_path, monkeypatch, files)
    jobs.select(file)
    before = chosen_by_the_user(host)
    with log_lines() as lines:
        p = jobs.run(override=Override(asked, "fp32"), during=lambda p: seen.append(in_effect(p)), n_iter=2)
    assert p.storage == [torch.float32] * 2
    assert jobs.loads == [(file, None)]
    assert seen == [Override(compute="fp32")] * 2
    assert len(lines) == 1
    assert asked in lines[0]
    assert reason in lines[0]
    in_fp16 = host.name == "neo" and file.endswith(".gguf")  # which Neo chooses by itself
    assert sorted(p.comments) == sorted([*lines, *([FP16_LORA] if in_fp16 else [])])
    assert chosen_by_the_user(host)[1:] == before[1:]


def test_a_refusal_is_for_the_checkpoint_at_hand_alone(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Override]
) -> None:
    jobs = start_jobs(host, tmp_path, monkeypatch, ("flux.gguf",))

    def hires(p: Any) -> None:
        seen.append(in_effect(p))
        jobs.second_pass(p, "flux.gguf")
        seen.append(in_effect(p))

    p = jobs.run(override=E4M3, during=hires, n_iter=2)
    assert seen == [E4M3, Override()] * 2
    assert jobs.loads == [(FIRST, FP8), ("flux.gguf", None)] * 2
    assert len(p.comments) == 1


def test_what_was_refused_is_in_effect_where_the_user_makes_it_possible(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Override]
) -> None:
    jobs = start_jobs(host, tmp_path, monkeypatch, ("flux.gguf",))
    jobs.select("flux.gguf")

    def another(p: Any) -> None:
        seen.append(in_effect(p))
        jobs.select(FIRST, "float8-e4m3fn")

    assert jobs.run(override=E4M3, during=another, n_iter=2).storage == [torch.float32, FP8]
    assert seen == [Override(), E4M3]


def test_a_storage_type_that_fails_to_load_is_tried_once_and_given_up(
    jobs: Jobs, seen: list[Override]
) -> None:
    jobs.broken.add(FP8)
    with log_lines() as lines:
        p = jobs.run(override=E4M3, during=lambda p: seen.append(in_effect(p)), n_iter=3)
    assert p.storage == [torch.float32] * 3
    assert seen == [Override()] * 3
    assert jobs.loads == [(FIRST, FP8), (FIRST, None)]
    assert "no room for torch.float8_e4m3fn" in next(iter(p.comments))
    assert lines.count(next(iter(p.comments))) == 1
    jobs.broken.clear()
    assert jobs.run(override=E4M3).storage == [FP8], "what failed once may have been the moment's fault"
