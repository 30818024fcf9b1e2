"""Every test of this folder runs against the doubles of Forge and of Forge Neo, and against the real ones
where FORGE_ROOT and NEO_ROOT point at them: each with the Python that runs it.

`only_on` marks what is about one of the two alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.generation.override import Override
from lib_precision_lora.host.page.settings import register_settings
from lib_precision_lora.host.reservation import memory
from tests.host.card import Card, card_with_us
from tests.host.card_plans import INFERENCE, PLENTY
from tests.host.checkpoints import Checkpoint
from tests.host.images import load_checkpoint
from tests.host.jobs import FIRST, Jobs, start_jobs
from tests.host.webui import KINDS, Host, missing, name_of, running_host

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """These tensors are small: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=KINDS)
def host_kind(request: pytest.FixtureRequest) -> str:
    """Session scope groups the tests by host, so that a real one is imported once, after the doubles."""
    reason = missing(request.param)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def _what_only_one_host_has(request: pytest.FixtureRequest) -> None:
    """Skip what is about another host than this one."""
    marker = request.node.get_closest_marker("only_on")
    if marker is not None and "host_kind" in request.fixturenames:
        name, reason = marker.args
        if name_of(request.getfixturevalue("host_kind")) != name:
            pytest.skip(reason)


@pytest.fixture
def bare_host(host_kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host without us."""
    lora_dir = tmp_path / "Lora"
    lora_dir.mkdir()
    with running_host(host_kind, tmp_path_factory.getbasetemp() / "host-data", lora_dir) as host:
        yield host
        uninstall()


@pytest.fixture
def host(bare_host: Host) -> Host:
    """A host with us in it, settings registered."""
    register_settings()
    assert install()
    return bare_host


@pytest.fixture
def checkpoint(host: Host) -> Checkpoint:
    """The one that is loaded."""
    return load_checkpoint(host, lambda: Checkpoint(host))


@pytest.fixture
def card(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A card with room for everything, and us in the host; tests make it smaller."""
    monkeypatch.setattr(memory, "WORTH_A_MOVE", 1024)
    with card_with_us(bare_host, PLENTY, INFERENCE) as card:
        yield card


@pytest.fixture
def jobs(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """The first checkpoint is loaded, and has made an image."""
    jobs = start_jobs(host, tmp_path, monkeypatch)
    jobs.run()
    assert jobs.loads == [(FIRST, None)]
    jobs.loads.clear()
    return jobs


@pytest.fixture
def api(host: Host, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A client of our routes alone."""
    pytest.importorskip("fastapi", reason="the routes need fastapi: run it with a Forge's own interpreter")
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from lib_precision_lora.host.page import api as module

    monkeypatch.setattr(host.shared.cmd_opts, "api", True, raising=False)
    monkeypatch.setattr(host.shared.cmd_opts, "api_auth", None, raising=False)
    monkeypatch.setattr(module, "check_arguments_of_requests", lambda: None)
    app = FastAPI()
    module.add_api(None, app)
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def seen() -> list[Override]:
    """What tests see to be in effect."""
    return []
