"""One thread for these small tensors: waking a second one costs more than it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lib_precision_lora.branch.arithmetic import plain_form


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["as a CPU", "as a CPU that multiplies bf16", "as a card"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the CPU multiplies: without or with products of bf16, whatever it is, or as a card whose build
    cannot sum half products into fp32."""
    monkeypatch.setattr(plain_form, "multiplies_bf16", lambda device: request.param.endswith("bf16"))
    if request.param == "as a card":
        monkeypatch.setattr(plain_form, "is_card", lambda device: True)
    return str(request.param)
