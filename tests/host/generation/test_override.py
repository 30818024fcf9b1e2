"""An override lasts for one generation, whatever happens in it; the user's own choices are never touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.generation.override import Override, in_effect, request
from tests.host.jobs import (
    E4M3,
    E5M2,
    FIRST,
    FP8,
    FP8_WIDE,
    SECOND,
    Jobs,
    chosen_by_the_user,
)
from tests.host.webui import Host


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
    p = jobs.new(override=Override("float8-e4m3fn", "fp16"))
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
