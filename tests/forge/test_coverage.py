"""Every parameter of the host's models, one by one: a patch beside it does what a merge into it would.

Measured as in `tests/patch_effects.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from lib_precision_lora.adapters import Target
from tests.forge.real_forge import Forge
from tests.forge.tiny_models import TINY_MODELS
from tests.patch_effects import effects_of_every_parameter, report
from tests.tiny import Tiny

LARGEST_ERROR = 1e-3
"""Measured: at most 2e-4 for the U-Nets, 1.4e-4 for SD 3 and 3.5, 2e-5 for Flux and Chroma, 2e-6 for the text
encoders: the noise of fp32, relative to what the following norms leave of a patch."""

LAST_CONTEXT_QUERY = "diffusion_model.joint_blocks.1.context_block.attn.ln_q"
NEVER_READ: Mapping[str, set[str]] = {
    "SD 3": {f"{LAST_CONTEXT_QUERY}.weight", f"{LAST_CONTEXT_QUERY}.bias"},
    "SD 3.5": {f"{LAST_CONTEXT_QUERY}.weight"},
    "CLIP": {"clip_l.transformer.text_projection.weight"},
}
"""Parameters of which the host's output does not depend: neither a merge nor a branch changes it. The
last block of SD 3 drops what its context's queries find; CLIP-L's projection is not called."""

CANCELS: Mapping[str, set[str]] = {
    "CLIP": {
        f"{encoder}.transformer.text_model.encoder.layers.{layer}.self_attn.k_proj.bias"
        for encoder in ("clip_l", "clip_g")
        for layer in (0, 1)
    },
}
"""Parameters that are read, but whose change is the same for all keys and vanishes in the softmax."""

LEFT_TO_THE_HOST: Mapping[str, set[str]] = {
    "CLIP": {"clip_l.logit_scale", "clip_g.logit_scale"},
    "T5": {"t5xxl.logit_scale"},
}
"""Parameters that take no branch: a single number has no rows. The host does not read these either."""

NOT_PARAMETERS: Mapping[str, set[str]] = {
    "SD 3": {"diffusion_model.pos_embed"},
    "SD 3.5": {"diffusion_model.pos_embed"},
}
"""Buffers for which the host's key map has a name; its `add_patches` drops patches of them."""


@pytest.fixture(scope="module", params=TINY_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(forge: Forge, name: str) -> Tiny:
    return TINY_MODELS[name](forge)


def test_every_parameter_takes_a_patch_as_a_merge_would(name: str, tiny: Tiny) -> None:
    found = effects_of_every_parameter(tiny)
    wrong = report(found.errors, LARGEST_ERROR)
    assert not wrong, wrong
    assert found.left == of_model(LEFT_TO_THE_HOST, name)
    assert found.never_read == of_model(NEVER_READ, name)
    assert found.cancels == of_model(CANCELS, name)


def test_every_name_of_the_key_map_that_the_model_has_is_a_parameter(name: str, tiny: Tiny) -> None:
    state, parameters = tiny.model.state_dict(), dict(tiny.model.named_parameters())
    known = {Target.parse(value).parameter for value in tiny.key_map.values()}
    assert known & set(parameters)
    assert (known & set(state)) - set(parameters) == of_model(NOT_PARAMETERS, name)


def of_model(names: Mapping[str, set[str]], model: str) -> set[str]:
    """What a list says of this model; a model's variants share what its first word's entry says."""
    return names.get(model, names.get(model.split()[0], set()))
