"""`GET /precision-lora/v1/inspect`: one file at a time; who asks meanwhile is told so at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from tests.host.lora_files import make_lora
from tests.host.webui import Host

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

INSPECT = "/precision-lora/v1/inspect"
OTHERS = 30
WAIT = 30.0
"""Seconds after which a test has failed that waits for another thread."""


@pytest.fixture(autouse=True)
def _files(host: Host) -> None:
    make_lora("cats").write(host)
    make_lora("dogs").write(host)
    host.networks.list_available_networks()


def test_a_second_inspection_is_refused_until_the_first_is_done(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_precision_lora.host.page import api as module

    inspect, reading, go_on, calls = module.inspect_file, Event(), Event(), []

    def slowly(path: Path, **how: Any) -> Any:
        calls.append(path.stem)
        reading.set()
        assert go_on.wait(WAIT)
        return inspect(path, **how)

    monkeypatch.setattr(module, "inspect_file", slowly)
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(api.get, INSPECT, params={"lora": "cats"})
        try:
            assert reading.wait(WAIT)
            answers = [api.get(INSPECT, params={"lora": name}) for name in ("cats", "dogs") * (OTHERS // 2)]
            unknown = api.get(INSPECT, params={"lora": "nobody"})
        finally:
            go_on.set()
        done = first.result(WAIT)
    assert [answer.status_code for answer in answers] == [409] * OTHERS
    assert answers[0].json() == {"detail": "Another LoRA is being inspected: ask again when that is done"}
    assert unknown.status_code == 404
    assert (done.status_code, done.json()["name"]) == (200, "cats")
    assert calls == ["cats"]
    assert api.get(INSPECT, params={"lora": "dogs"}).status_code == 200


@pytest.mark.parametrize("failure", ["UnreadableFileError", "RuntimeError"])
def test_an_inspection_that_fails_does_not_refuse_the_next_one(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    from lib_precision_lora.host.page import api as module

    error = module.UnreadableFileError if failure == "UnreadableFileError" else RuntimeError

    def fail(path: Path, **how: Any) -> Any:
        raise error("broken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "inspect_file", fail)
        assert api.get(INSPECT, params={"lora": "cats"}).status_code in (422, 500)
    assert api.get(INSPECT, params={"lora": "cats"}).status_code == 200


def test_the_refusal_is_documented(api: TestClient) -> None:
    answers = api.get("/openapi.json").json()["paths"][INSPECT]["get"]["responses"]
    assert {"200", "404", "409"} <= answers.keys()
