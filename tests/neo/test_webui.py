"""A running Forge Neo: the tests of `tests/running/test_webui.py`, and what is Neo's own.

Two servers run, one with the extension and one without, which is the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.neo.webui import NeoUI
from tests.running.test_webui import (  # noqa: F401  pytest runs what stands here
    ROUNDING,
    VISIBLE,
    base,
    models,
    ours,
    stock,
    strong,
    test_a_change_of_compute_mode_acts_at_the_next_generation,
    test_a_file_written_over_is_read_again,
    test_a_generation_is_stopped_where_that_is_set,
    test_a_lora_leaves_nothing_behind,
    test_a_lora_that_cannot_be_applied_is_left_out_whole_and_named,
    test_a_prompt_means_what_it_means_to_forge,
    test_an_image_that_we_made_is_told_from_one_of_forge_without_the_extension,
    test_switching_off_and_on_acts_at_the_next_generation,
    test_ten_times_the_same_file_is_told_with_the_sum,
    test_the_same_lora_twice_adds_up,
    test_without_a_lora_the_file_is_that_of_forge_without_the_extension,
    webui,
)
from tests.running.webui import HIRES, Generation, WebUI


@pytest.fixture(scope="module")
def forge_root(neo_root: Path) -> Path:
    """Whose classes make the checkpoint."""
    return neo_root


@pytest.fixture(scope="module")
def servers(
    neo_root: Path,
    models: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[WebUI, WebUI]]:
    """Neo without the extension, and with it; they start side by side."""
    data = tmp_path_factory.mktemp("servers")
    with (
        NeoUI(neo_root, data / "stock", models, extension=False) as without,
        NeoUI(neo_root, data / "webui", models, extension=True) as with_us,
    ):
        for server in (without, with_us):
            server.wait_until_ready()
            server.post("options", {"sd_model_checkpoint": "small.safetensors"})
        yield without, with_us


def test_ten_changes_of_strength_place_no_model(webui: WebUI) -> None:  # noqa: F811
    webui.generate("a cat <lora:strong:1>")
    position = webui.log_position()
    for step in range(10):
        ours(webui, f"a cat <lora:strong:{0.1 * (step + 1):.1f}>")
    webui.generate("a cat")
    log = webui.log(position)
    assert "Requested to load" not in log
    assert log.count("loaded partially") == 0


def test_a_lora_on_a_float8_checkpoint_is_that_on_the_exact_one(
    webui: WebUI,  # noqa: F811
    stock: WebUI,  # noqa: F811
    base: Generation,  # noqa: F811
) -> None:
    """The checkpoint's weights are float8 values. Neo itself ignores this override over its API."""
    prompt = "a cat <lora:faint:1>"
    exact = stock.generate(prompt)
    low = {"override_settings": {"forge_unet_storage_dtype": "float8-e4m3fn"}}
    branched = webui.generate(prompt, **low)
    assert "fp8-e4m3fn" in webui.status()["last_generation"]["stored"]
    assert exact.difference(base) > VISIBLE
    assert branched.difference(exact) <= ROUNDING
    assert webui.generate("a cat").png == base.png
    assert webui.status()["last_generation"]["stored"].keys() == {"dense-fp32"}


def test_the_hires_prompt_may_have_another_lora(webui: WebUI, stock: WebUI) -> None:  # noqa: F811
    """Neo has no upscaler in latent space; those of images are loaded with the page, and asked for here."""
    names = [each["name"] for each in webui.get("upscalers")]
    if not names:
        pytest.skip("this Neo has no upscaler, and hires fix fails in it without this extension, too")
    hires = {**HIRES, "hr_upscaler": names[0]}
    same = webui.generate("a cat <lora:strong:1>", **hires)
    hires["hr_prompt"] = "a cat <lora:other:1>"
    other = webui.generate("a cat <lora:strong:1>", **hires)
    assert min(other.pixels.shape[:2]) > 64
    assert other.difference(same) > VISIBLE
    assert other.difference(stock.generate("a cat <lora:strong:1>", **hires)) <= ROUNDING
