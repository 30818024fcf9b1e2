"""Every parameter of Neo's models, one by one: a patch beside it does what a merge into it would.

Measured as in `tests/patch_effects.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lib_precision_lora.adapters import Target
from tests.neo.real_neo import Neo
from tests.neo.tiny_models import TINY_MODELS
from tests.patch_effects import effects_of_every_parameter, error_of_every_layer_at_once, report
from tests.tiny import Tiny

LARGEST_ERROR = 1e-3
"""Measured: at most 4.7e-4 (Wan, Anima), else 2e-4 and less: the noise of fp32, relative to what the
following norms leave of one parameter's patch."""

LARGEST_ERROR_OF_ALL = 1e-5
"""Measured: at most 2.7e-6."""

LAST_TEXT = (
    *(f"attn.{part}" for part in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")),
    *(f"attn.to_add_out.{end}" for end in ("weight", "bias")),
    *(f"txt_mlp.net.{part}.{end}" for part in ("0.proj", "2") for end in ("weight", "bias")),
)
NEVER_READ: Mapping[str, set[str]] = {
    "Qwen-Image": {f"diffusion_model.transformer_blocks.1.{name}" for name in LAST_TEXT},
}
"""Parameters of which the host's output does not depend: the last block of Qwen-Image drops what it makes of
the prompt."""

CANCELS: Mapping[str, set[str]] = {}
"""Parameters that are read, but whose change is the same for all keys and vanishes in the softmax."""


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(neo: Neo, name: str) -> Tiny:
    return TINY_MODELS[name](neo)


def test_every_parameter_takes_a_patch_as_a_merge_would(name: str, tiny: Tiny) -> None:
    found = effects_of_every_parameter(tiny)
    wrong = report(found.errors, LARGEST_ERROR)
    assert not wrong, wrong
    assert found.left == set()
    assert found.never_read == NEVER_READ.get(name, set())
    assert found.cancels == CANCELS.get(name, set())


def test_a_file_on_every_layer_at_once_is_a_merged_copy(tiny: Tiny) -> None:
    error = error_of_every_layer_at_once(tiny, 0.3)
    assert error <= LARGEST_ERROR_OF_ALL


def test_every_name_of_the_key_map_that_the_model_has_is_a_parameter(name: str, tiny: Tiny) -> None:
    state, parameters = tiny.model.state_dict(), dict(tiny.model.named_parameters())
    known = {Target.parse(value).parameter for value in tiny.key_map.values()}
    assert known & set(parameters)
    assert (known & set(state)) - set(parameters) == set()
