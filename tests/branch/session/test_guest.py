"""Law 8: a good guest. No flag of torch is changed, nothing is registered with the host's modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lib_precision_lora.branch import PatchSession
from lib_precision_lora.strict_product import tensor_float_allowed
from tests.branch.hosts import IDS, IMAGE, Mixed
from tests.branch.patch_sets import EVERYTHING, outputs


def flags() -> dict[str, object]:
    """Every process-wide setting of torch that a product might be tempted to change."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "precision": torch.get_float32_matmul_precision(),
        "cuda": torch.backends.cuda.matmul.allow_tf32,
        "cuda fp16": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "cuda bf16": torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "mkldnn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast type": torch.get_autocast_dtype("cpu"),
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "random state": torch.get_rng_state().numpy().tobytes(),
        "anomalies": torch.is_anomaly_enabled(),
    }


@pytest.fixture(params=[False, True], ids=["TF32 forbidden", "TF32 allowed"])
def _tensor_float(request: pytest.FixtureRequest) -> Iterator[None]:
    holders = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [holder.allow_tf32 for holder in holders]
    for holder in holders:
        holder.allow_tf32 = request.param
    yield
    for holder, value in zip(holders, before, strict=True):
        holder.allow_tf32 = value


@pytest.mark.usefixtures("_tensor_float")
def test_no_global_flag_of_torch_is_changed() -> None:
    model = Mixed()
    before = flags()
    with PatchSession(model) as session:
        for compute in ("auto", "fp16", "fp32"):
            session.apply(EVERYTHING, compute)
            outputs(model)
            assert flags() == before
    assert flags() == before


def test_nothing_is_registered_with_the_hosts_modules() -> None:
    model = Mixed()

    def registered() -> list[str]:
        names = [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]
        return names + [name for name, _ in model.named_modules()] + list(model.state_dict())

    def attributes() -> list[set[str]]:
        return [set(vars(module)) for module in model.modules()]

    names, own = registered(), attributes()
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        outputs(model)
        assert registered() == names
        assert attributes() == own
        assert sum(isinstance(value, nn.Parameter) for value in model.parameters()) == len(
            list(model.parameters())
        )


def test_the_hosts_state_dict_has_the_base_of_every_hooked_layer_while_attached() -> None:
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        outputs(model)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"register"}


def test_gradients_and_inference_mode_are_the_hosts_to_choose() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        plain = outputs(model)
        with torch.inference_mode():
            assert torch.equal(model(IDS, IMAGE), plain)
        session.release()
        with torch.inference_mode():
            model(IDS, IMAGE)
        assert torch.equal(model(IDS, IMAGE), plain)


def test_a_process_that_uses_torchs_newer_precision_flags_is_understood() -> None:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert tensor_float_allowed(convolution=False) in (True, False)
        return
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert tensor_float_allowed(convolution=False)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
