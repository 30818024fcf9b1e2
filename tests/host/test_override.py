"""An override lasts for one generation, whatever happens in it; the user's own choices are never touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_precision_lora.host import binding, install, uninstall
from lib_precision_lora.host.override import AS_SET, Override, in_effect, low_bits_choices, request
from lib_precision_lora.host.settings import Settings
from tests.host.jobs import FP8, FP8_WIDE, OPTION, Jobs, start_jobs
from tests.host.observers import log_lines
from tests.host.webui import Host

FIRST, SECOND = "first.safetensors", "second.safetensors"
E4M3, E5M2 = Override("float8-e4m3fn"), Override("float8-e5m2")


@pytest.fixture
def jobs(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """The first checkpoint is loaded, and has made an image."""
    jobs = start_jobs(host, tmp_path, monkeypatch)
    jobs.run()
    assert jobs.loads == [(FIRST, None)]
    jobs.loads.clear()
    return jobs


@pytest.fixture
def seen() -> list[Override]:
    """What tests see to be in effect."""
    return []


def settings() -> Settings:
    active = binding.active()
    assert active is not None
    return active.settings()


def chosen_by_the_user(host: Host) -> tuple[Any, ...]:
    """All that an override must leave alone; the options' file with its bytes."""
    return (
        dict(host.shared.opts.data),
        Path(host.shared.config_filename).read_bytes(),
        dict(host.sd_models.model_data.forge_loading_parameters),
        dict(host.args.dynamic_args),
        settings(),
    )


def test_a_storage_type_lasts_for_one_generation(jobs: Jobs) -> None:
    before = chosen_by_the_user(jobs.host)
    assert jobs.run(override=E4M3).storage == [FP8]
    assert chosen_by_the_user(jobs.host) == before
    assert jobs.run().storage == [torch.float32]
    assert jobs.loads == [(FIRST, FP8), (FIRST, None)]


def test_the_same_override_again_loads_nothing(jobs: Jobs) -> None:
    for _ in range(3):
        assert jobs.run(override=E4M3).storage == [FP8]
    assert jobs.loads == [(FIRST, FP8)]
    for override in (Override(compute="fp16"), Override("Automatic"), Override(), None):
        assert jobs.run(override=override).storage == [torch.float32]
    assert jobs.loads == [(FIRST, FP8), (FIRST, None)]


def test_an_override_that_is_what_the_user_has_set_loads_nothing(jobs: Jobs, seen: list[Override]) -> None:
    jobs.select(low_bits="float8-e4m3fn")
    jobs.run()
    p = jobs.run(override=E4M3, during=lambda p: seen.append(in_effect(p)))
    assert p.storage == [FP8]
    assert seen == [E4M3]
    assert jobs.loads == [(FIRST, FP8)]


def test_a_type_that_the_file_has_by_itself_loads_nothing(jobs: Jobs) -> None:
    """Automatic takes the file's own type, which here is the one that is asked for."""
    jobs.host.current.model.storage_dtype = FP8
    assert jobs.run(override=E4M3).storage == [FP8]
    assert jobs.loads == []


def fails(p: Any) -> None:
    raise RuntimeError("out of memory in the sampler")


def interrupted(jobs: Jobs) -> Callable[[Any], None]:
    return lambda p: setattr(jobs.host.shared.state, "interrupted", True)


def skipped(jobs: Jobs) -> Callable[[Any], None]:
    return lambda p: setattr(jobs.host.shared.state, "skipped", True)


ENDINGS: dict[str, tuple[Callable[[Jobs], Callable[[Any], None]], list[Any]]] = {
    "by itself": (lambda jobs: lambda p: None, [FP8] * 3),
    "by an error": (lambda jobs: fails, [FP8]),
    "interrupted": (interrupted, [FP8]),
    "skipped": (skipped, [FP8] * 3),
    "after hires fix": (lambda jobs: lambda p: jobs.second_pass(p, FIRST), [FP8] * 6),
    "after another checkpoint": (lambda jobs: lambda p: jobs.second_pass(p, SECOND), [FP8] * 6),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_it_ends_with_its_generation_however_that_ends(jobs: Jobs, ending: str, seen: list[Override]) -> None:
    make, storage = ENDINGS[ending]
    before = chosen_by_the_user(jobs.host)
    everything = Override("float8-e4m3fn", "fp16", "stock Forge merge")
    p = jobs.new(override=everything, during=make(jobs), n_iter=3)
    if ending == "by an error":
        with pytest.raises(RuntimeError, match="in the sampler"):
            jobs.host.processing.process_images(p)
    else:
        jobs.host.processing.process_images(p)
    assert p.storage == storage
    assert {loaded for _, loaded in jobs.loads} == {FP8}
    assert chosen_by_the_user(jobs.host) == before
    assert in_effect(p) == Override()
    jobs.host.shared.state.interrupted = False
    loads = len(jobs.loads)
    assert jobs.run(during=lambda p: seen.append(in_effect(p))).storage == [torch.float32]
    assert seen == [Override()]
    assert jobs.loads[loads:] == [(FIRST, None)]


def test_another_checkpoint_of_the_same_generation_is_stored_alike(jobs: Jobs) -> None:
    jobs.run(override=E4M3, during=lambda p: jobs.second_pass(p, SECOND), n_iter=2)
    assert jobs.loads == [(name, FP8) for name in (FIRST, SECOND, FIRST, SECOND)]
    jobs.run()
    assert jobs.loads[4:] == [(FIRST, None)]


def test_it_ends_where_the_checkpoint_cannot_be_loaded_at_all(jobs: Jobs) -> None:
    """Not in the storage type of the override, and not in the user's own: then the next one has a model."""
    jobs.broken |= {FP8, None}
    p = jobs.new(override=E4M3)
    with pytest.raises(RuntimeError, match="no room for None"):
        jobs.host.processing.process_images(p)
    assert in_effect(p) == Override()
    assert jobs.loads == [(FIRST, FP8), (FIRST, None)]
    jobs.broken.clear()
    assert jobs.run().storage == [torch.float32]
    assert jobs.run(override=E4M3).storage == [FP8]


def test_a_way_back_that_failed_once_is_taken_the_next_time(jobs: Jobs) -> None:
    jobs.run(override=E4M3)
    jobs.broken.add(None)
    with pytest.raises(RuntimeError, match="no room"):
        jobs.run()
    assert jobs.run(override=E4M3).storage == [FP8], "the host alone would believe that it is still there"
    jobs.broken.clear()
    assert jobs.run().storage == [torch.float32]


def test_what_the_user_changes_meanwhile_is_theirs(jobs: Jobs) -> None:
    p = jobs.run(override=E4M3, during=lambda p: jobs.select(SECOND, "float8-e5m2"), n_iter=2, prompt="a dog")
    assert p.storage == [FP8, FP8]
    assert jobs.host.shared.opts.forge_unet_storage_dtype == "float8-e5m2"
    assert jobs.run().storage == [FP8_WIDE]
    assert jobs.loads == [(FIRST, FP8), (SECOND, FP8), (SECOND, FP8_WIDE)]


def test_what_the_user_changes_while_the_checkpoint_is_loaded_is_theirs(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = jobs.host.sd_models.forge_loader

    def loading(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(jobs.host.sd_models, "forge_loader", load)
        checkpoint = load(*args, **kwargs)
        jobs.select(low_bits="float8-e5m2")
        return checkpoint

    monkeypatch.setattr(jobs.host.sd_models, "forge_loader", loading)
    assert jobs.run(override=E4M3).storage == [FP8]
    assert jobs.run().storage == [FP8_WIDE]


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        (None, Override("float8-e4m3fn", "fp32")),
        (Override(), Override("float8-e4m3fn", "fp32")),
        (E5M2, Override("float8-e5m2", "fp32")),
        (Override(compute="fp16"), Override("float8-e4m3fn", "fp16")),
        (Override(patcher="stock Forge merge"), Override("float8-e4m3fn", "fp32", "stock Forge merge")),
    ],
)
def test_overrides_of_nested_generations_stack(
    jobs: Jobs, inner: Override | None, expected: Override, seen: list[Override]
) -> None:
    """As ADetailer's: what the inner one leaves open is the outer one's."""
    outer = Override("float8-e4m3fn", "fp32")

    def nest(p: Any) -> None:
        nested = jobs.run(override=inner, during=lambda inside: seen.append(in_effect(inside)))
        assert nested.storage == [FP8_WIDE if inner is E5M2 else FP8]
        assert in_effect(nested) == Override()
        seen.append(in_effect(p))

    p = jobs.run(override=outer, during=nest, n_iter=2)
    assert seen == [expected, outer] * 2
    assert p.storage == [FP8, FP8]
    assert jobs.run().storage == [torch.float32]


def test_a_nested_generation_alone_may_have_one(jobs: Jobs) -> None:
    def nest(p: Any) -> None:
        assert jobs.run(override=E4M3).storage == [FP8]
        assert in_effect(p) == Override()

    def nest_and_fail(p: Any) -> None:
        with pytest.raises(RuntimeError, match="in the sampler"):
            jobs.run(override=E4M3, during=fails)

    for during in (nest, nest_and_fail):
        assert jobs.run(during=during, n_iter=2).storage == [torch.float32] * 2


def test_the_last_request_counts_and_is_that_objects_alone(jobs: Jobs) -> None:
    p, other = jobs.new(), jobs.new()
    request(p, E5M2)
    request(p, E4M3)
    for _ in range(2):
        jobs.host.processing.process_images(p)
    jobs.host.processing.process_images(other)
    assert p.storage == [FP8, FP8]
    assert other.storage == [torch.float32]


@pytest.mark.parametrize("restored", [True, False])
def test_the_upscale_button_follows_though_the_host_loads_nothing_there(jobs: Jobs, restored: bool) -> None:
    p = jobs.new(override=E4M3, hr_checkpoint_name=FIRST if restored else None)
    p.txt2img_upscale = True
    jobs.host.processing.process_images(p)
    assert p.storage == [FP8]
    p = jobs.new(hr_checkpoint_name=FIRST)
    p.txt2img_upscale = True
    jobs.host.processing.process_images(p)
    assert p.storage == [torch.float32]


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


def test_the_choices_are_the_hosts_own_after_as_set(host: Host) -> None:
    choices = low_bits_choices()
    assert choices[0] == AS_SET
    assert choices[1:] == list(host.main_entry.forge_unet_storage_dtype_options)
    assert {"Automatic", "bnb-nf4", "float8-e4m3fn"} <= set(choices)


def write_header(path: Path, *names: str) -> None:
    """A safetensors file of which only the names matter."""
    header = json.dumps({name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


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
    layer = "model.diffusion_model.double_blocks.0.img_attn.proj"
    write_header(tmp_path / "nf4.safetensors", f"{layer}.weight.quant_state.bitsandbytes__nf4")
    write_header(tmp_path / "scaled.safetensors", f"{layer}.weight", f"{layer}.scale_weight")
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
    assert list(p.comments) == lines
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


def test_leaving_the_host_puts_back_what_stands_around_a_generation(bare_host: Host) -> None:
    places = (
        (bare_host.processing, "manage_model_and_prompt_cache"),
        (bare_host.processing, "process_images_inner"),
        (bare_host.processing, "set_config"),
        (bare_host.processing, "forge_model_reload"),
        (bare_host.sd_models, "forge_model_reload"),
    )
    before = [getattr(owner, name) for owner, name in places]
    assert install()
    assert all(getattr(owner, name) is not found for (owner, name), found in zip(places, before, strict=True))
    uninstall()
    assert [getattr(owner, name) for owner, name in places] == before
