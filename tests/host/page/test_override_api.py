"""A storage type in `override_settings`, which the host ignores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lib_precision_lora.host.generation.override import Override, in_effect
from tests.host.jobs import (
    E4M3,
    E5M2,
    FIRST,
    FP8,
    FP8_WIDE,
    OPTION,
    SECOND,
    Jobs,
    chosen_by_the_user,
)


def test_the_apis_override_settings_take_effect(jobs: Jobs, seen: list[Override]) -> None:
    before = chosen_by_the_user(jobs.host)

    def look(p: Any) -> None:
        seen.append(in_effect(p))
        assert jobs.host.shared.opts.forge_unet_storage_dtype == "Automatic"

    for asked, storage in ((True, FP8), (False, torch.float32), (True, FP8), (True, FP8)):
        fields = {"override_settings": {OPTION: "float8-e4m3fn"}} if asked else {}
        p = jobs.run(during=look, **fields)
        assert p.storage == [storage]
        assert p.override_settings == fields.get("override_settings", {})
    assert seen == [E4M3, Override(), E4M3, E4M3]
    assert jobs.loads == [(FIRST, FP8), (FIRST, None), (FIRST, FP8)]
    assert chosen_by_the_user(jobs.host) == before


def test_the_apis_override_settings_may_bring_another_checkpoint(jobs: Jobs) -> None:
    before = chosen_by_the_user(jobs.host)
    both = {"sd_model_checkpoint": SECOND, OPTION: "float8-e4m3fn"}
    jobs.run(override_settings=both)
    jobs.run()
    assert jobs.loads == [(SECOND, FP8), (FIRST, None)]
    assert chosen_by_the_user(jobs.host) == before


def test_an_accordions_choice_goes_before_that_of_override_settings(jobs: Jobs) -> None:
    assert jobs.run(override=E5M2, override_settings={OPTION: "float8-e4m3fn"}).storage == [FP8_WIDE]


def test_a_client_that_restores_nothing_has_changed_the_setting(jobs: Jobs) -> None:
    fields = {"override_settings": {OPTION: "float8-e4m3fn"}, "override_settings_restore_afterwards": False}
    file = Path(jobs.host.shared.config_filename).read_bytes()
    assert jobs.run(**fields).storage == [FP8]
    assert jobs.run().storage == [FP8]
    assert jobs.host.shared.opts.forge_unet_storage_dtype == "float8-e4m3fn"
    assert Path(jobs.host.shared.config_filename).read_bytes() == file
    assert jobs.loads == [(FIRST, FP8)]
