"""The extension's routes in a real Forge's API: who is let in, which files can be named, what is told."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch

from lib_precision_lora import __version__
from tests.forge.real_forge import Forge

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from lib_precision_lora.host.binding import Binding

ROOT = "/precision-lora/v1"
ROUTES = ("status", "inspect?lora=cats")
CLIENTS, CALLS = 25, 200


@pytest.fixture
def loras(forge: Forge, tmp_path: Path) -> Iterator[Path]:
    """A folder with a sound file and a truncated one, as the host lists it, and a third file beside it."""
    folder = tmp_path / "Lora"
    folder.mkdir()
    factors = {"up": torch.ones(6, 2), "down": torch.ones(2, 4)}
    tensors = {f"lora_unet_blocks_0.lora_{part}.weight": value for part, value in factors.items()}
    safetensors.torch.save_file(
        {**tensors, "lora_unet_blocks_0.alpha": torch.tensor(1.0)}, folder / "cats.safetensors"
    )
    whole = (folder / "cats.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "outside.safetensors").write_bytes(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forge.shared.cmd_opts, "lora_dir", str(folder))
        forge.networks.list_available_networks()
        yield folder
    forge.networks.list_available_networks()


def client(
    forge: Forge, monkeypatch: pytest.MonkeyPatch, api: bool = True, auth: str | None = None
) -> TestClient:
    """Of an application as the host hands it to extensions when it was started with these arguments."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from lib_precision_lora.host.page.api import add_api, remove_api

    monkeypatch.setattr(forge.shared.cmd_opts, "api", api)
    monkeypatch.setattr(forge.shared.cmd_opts, "api_auth", auth)
    app = FastAPI()
    add_api(None, app)
    remove_api()
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def api(forge: Forge, precision_lora: Binding, loras: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    return client(forge, monkeypatch)


def test_without_the_api_flag_there_are_no_routes(
    forge: Forge, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = client(forge, monkeypatch, api=False)
    assert [without.get(f"{ROOT}/{route}").status_code for route in ROUTES] == [404, 404]


@pytest.mark.parametrize("route", ROUTES)
def test_credentials_are_asked_for_where_the_webui_asks_for_them(
    forge: Forge, precision_lora: Binding, loras: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    guarded = client(forge, monkeypatch, auth="ann:one,bob:two")
    for given, status in (
        (None, 401),
        ("ann:two", 401),
        ("ann:", 401),
        (":one", 401),
        ("eve:one", 401),
        ("ann:one", 200),
        ("bob:two", 200),
    ):
        headers = (
            {} if given is None else {"Authorization": f"Basic {base64.b64encode(given.encode()).decode()}"}
        )
        answer = guarded.get(f"{ROOT}/{route}", headers=headers)
        assert answer.status_code == status, given
        if status == 401:
            assert answer.headers["WWW-Authenticate"] == "Basic"
            assert "cats" not in answer.text


def test_the_status_says_what_is_set(api: TestClient, forge: Forge) -> None:
    answer = api.get(f"{ROOT}/status").json()
    assert answer["version"] == __version__
    assert answer["active"] is answer["enabled"] is True
    assert answer["compute"] == "Automatic"
    forge.shared.opts.data["precision_lora_enabled"] = False
    forge.shared.opts.data["precision_lora_compute"] = "fp32"
    answer = api.get(f"{ROOT}/status").json()
    assert (answer["enabled"], answer["compute"]) == (False, "fp32")


def test_an_inspection_tells_of_a_listed_file_and_not_where_it_lies(api: TestClient, loras: Path) -> None:
    answer = api.get(f"{ROOT}/inspect", params={"lora": "cats"})
    assert answer.status_code == 200
    found = answer.json()
    assert (found["name"], found["layout"], found["kinds"]) == ("cats", "kohya", {"lora": 1})
    assert (found["ranks"], found["alphas"]) == ({"2": 1}, {"1.0": 1})
    assert found["findings"] == []
    assert str(loras) not in answer.text


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "cats.safetensors",
        "../outside",
        "../outside.safetensors",
        "..\\outside",
        "Lora/cats",
        "/etc/passwd",
        "C:\\Windows\\win.ini",
        "~/x",
        "cats\x00",
        "<script>",
        "none",
        "%2e%2e/outside",
    ],
)
def test_a_name_that_the_webui_does_not_list_is_not_found(api: TestClient, loras: Path, name: str) -> None:
    answer = api.get(f"{ROOT}/inspect", params={"lora": name})
    assert answer.status_code == 404
    assert answer.json() == {"detail": "There is no LoRA of this name; name it as the WebUI's Lora tab does"}


def test_an_absolute_path_of_a_listed_file_is_not_found(api: TestClient, loras: Path) -> None:
    for path in (loras / "cats.safetensors", loras / "cats", loras.parent / "outside.safetensors"):
        answer = api.get(f"{ROOT}/inspect", params={"lora": str(path)})
        assert answer.status_code == 404
        assert str(loras) not in answer.text


@pytest.mark.parametrize("query", [{}, {"lora": ""}, {"lora": "x" * 1000}])
def test_a_request_without_a_sensible_name_is_refused(api: TestClient, query: dict[str, str]) -> None:
    answer = api.get(f"{ROOT}/inspect", params=query)
    assert answer.status_code == 422
    assert "Traceback" not in answer.text


def test_a_damaged_file_is_a_sentence(api: TestClient, loras: Path) -> None:
    answer = api.get(f"{ROOT}/inspect", params={"lora": "cut"})
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("cut.safetensors: the file is truncated: it has ")
    assert str(loras) not in answer.text


def test_a_failure_of_ours_is_a_sentence_and_its_trace_is_in_the_log(
    api: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lib_precision_lora.host.page import api as module

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(module, "inspect_file", fail)
    monkeypatch.setattr(module.logger, "propagate", True)
    answer = api.get(f"{ROOT}/inspect", params={"lora": "cats"})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "Inspecting LoRA cats failed; the WebUI's log says why"}
    assert "secret detail" in caplog.text


def test_the_routes_are_documented(api: TestClient) -> None:
    described = api.get("/openapi.json").json()
    assert {f"{ROOT}/status", f"{ROOT}/inspect"} <= described["paths"].keys()
    for name in ("Status", "Inspection", "Generation", "File"):
        assert described["components"]["schemas"][name]["properties"]


def test_many_clients_at_once_get_the_same_answer(api: TestClient) -> None:
    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = list(threads.map(lambda _: api.get(f"{ROOT}/status").json(), range(CALLS)))
    assert len(answers) == CALLS
    assert all(answer == answers[0] for answer in answers)
