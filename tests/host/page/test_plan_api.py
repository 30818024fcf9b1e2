"""`GET /precision-lora/v1/plan`: what is asked, what is answered, and what is refused in a sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lib_precision_lora.host import installation, uninstall
from lib_precision_lora.ui.settings import ENABLED
from tests.host.checkpoints import Checkpoint
from tests.host.images import load_checkpoint
from tests.host.lora_files import make_lora
from tests.host.webui import Host

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

pytest.importorskip("fastapi", reason="the routes need fastapi: run it with a Forge's own interpreter")

PLAN = "/precision-lora/v1/plan"


@pytest.fixture
def checkpoint(host: Host) -> Checkpoint:
    make_lora("cats", 0, 4).write(host)
    make_lora("dogs", 1, 8).write(host)
    host.networks.list_available_networks()
    return load_checkpoint(host, lambda: Checkpoint(host))


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    return str(answer.json()["detail"])


def test_the_answer_is_the_plan_of_the_loras_asked_for(api: TestClient, checkpoint: Checkpoint) -> None:
    active = installation.active()
    assert active is not None
    query = {"lora": ["cats:0.8", "dogs"], "width": 512, "height": 256}
    answer = api.get(PLAN, params=query)
    assert answer.status_code == 200, answer.text
    found, expected = answer.json(), active.plan_for([("cats", 0.8), ("dogs", 1.0)], 64 * 32)
    for name in ("diffusion_model", "text_encoder", "together"):
        model = getattr(expected, name)
        for key in ("placement", "peak_bytes", "reserve_bytes", "resident_bytes", "streamed_bytes"):
            assert found[name][key] == getattr(model.plan, key)
        assert (found[name]["advice"], found[name]["left_out"]) == ([], [])
    assert found["diffusion_model"]["peak_bytes"] > found["diffusion_model"]["resident_bytes"] > 0
    less = api.get(PLAN, params={**query, "width": 64}).json()
    assert less["diffusion_model"]["peak_bytes"] < found["diffusion_model"]["peak_bytes"]


@pytest.mark.parametrize(
    "name", ["nowhere", "../cats", "..\\cats", "/etc/passwd", "cats.safetensors", "%2e%2e/cats", "cats\x00"]
)
def test_a_name_that_the_webui_does_not_list_is_not_found(
    api: TestClient, checkpoint: Checkpoint, name: str
) -> None:
    for given in (name, f"{name}:1"):
        assert refused(api.get(PLAN, params={"lora": ["cats:1", given]}), 404).startswith("There is no LoRA")


def test_a_path_of_a_listed_file_is_not_found(host: Host, api: TestClient, checkpoint: Checkpoint) -> None:
    for path in (host.lora_dir / "cats.safetensors", host.lora_dir / "cats"):
        assert str(host.lora_dir) not in refused(api.get(PLAN, params={"lora": f"{path}:1"}), 404)


@pytest.mark.parametrize("strength", ["NaN", "inf", "-Infinity", "abc", "", "1e999", "1:x"])
def test_a_strength_that_is_no_finite_number_is_refused(
    api: TestClient, checkpoint: Checkpoint, strength: str
) -> None:
    assert "finite number" in refused(api.get(PLAN, params={"lora": f"cats:{strength}"}), 422)


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"lora": ""},
        {"lora": ":1"},
        {"lora": "x" * 1000},
        {"lora": ["cats"] * 65},
        {"lora": "cats", "width": 0},
        {"lora": "cats", "height": "1e3"},
        {"lora": "cats", "width": 10**9},
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    api: TestClient, checkpoint: Checkpoint, query: dict[str, Any]
) -> None:
    assert refused(api.get(PLAN, params=query), 422)


def test_a_lora_of_no_layer_is_refused_in_a_sentence(
    host: Host, api: TestClient, checkpoint: Checkpoint
) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.replace("lora_", "lora_other_")] = tensors.pop(key)

    make_lora("fish").with_tensors(rename).write(host)
    host.networks.list_available_networks()
    sentence = refused(api.get(PLAN, params={"lora": "fish:1"}), 422)
    assert sentence.startswith("LoRA fish would be left out: it is no LoRA that is known: none of its 15")
    assert str(host.lora_dir) not in sentence


def test_without_a_checkpoint_or_switched_off_the_answer_is_a_conflict(
    host: Host, api: TestClient, checkpoint: Checkpoint
) -> None:
    host.set_option(ENABLED, False)
    assert "switched off" in refused(api.get(PLAN, params={"lora": "cats"}), 409)
    host.set_option(ENABLED, True)
    host.sd_models.model_data.sd_model = None
    assert "No checkpoint is loaded" in refused(api.get(PLAN, params={"lora": "cats"}), 409)
    uninstall()
    assert "switched off" in refused(api.get(PLAN, params={"lora": "cats"}), 409)


def test_while_the_webui_is_at_work_nothing_is_planned(api: TestClient, checkpoint: Checkpoint) -> None:
    queue = sys.modules["modules.call_queue"].queue_lock
    with queue:
        assert "at work" in refused(api.get(PLAN, params={"lora": "cats"}), 409)
    assert api.get(PLAN, params={"lora": "cats"}).status_code == 200
    assert queue.acquire(blocking=False), "it is not kept"
    queue.release()


def test_a_failure_of_ours_is_a_sentence_and_the_queue_goes_on(
    api: TestClient, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(installation, "active", lambda: SimpleNamespace(settings=settings, plan_for=fail))
        assert refused(api.get(PLAN, params={"lora": "cats"}), 500) == (
            "Planning failed; the WebUI's log says why"
        )
    assert api.get(PLAN, params={"lora": "cats"}).status_code == 200


def settings() -> Any:
    return SimpleNamespace(enabled=True)


def test_the_route_is_documented(api: TestClient) -> None:
    described = api.get("/openapi.json").json()
    route = described["paths"][PLAN]["get"]
    assert {"200", "404", "409", "422"} <= route["responses"].keys()
    schema = described["components"]["schemas"]
    for name in ("LoraPlan", "ModelPlan"):
        assert schema[name]["properties"]
    assert all("description" in each for each in schema["ModelPlan"]["properties"].values())
