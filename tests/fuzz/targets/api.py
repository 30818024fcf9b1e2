"""Arguments of our routes, and of our script in a request for an image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_precision_lora.host.generation import override
from lib_precision_lora.host.page import api
from lib_precision_lora.host.page.arguments import problems, wanted
from lib_precision_lora.ui.choices import COMPUTE_CHOICES, OURS, PATCHERS
from tests.fuzz.host import FILES, log, patched, webui
from tests.fuzz.target import Check, Fault, Input, Target
from tests.fuzz.texts import check_said, name, number
from tests.host.checkpoints import Checkpoint
from tests.host.images import load_checkpoint
from tests.host.observers import bases_of

STATUSES = {200, 404, 409, 422}
PATHS = (
    "Lora/cats.safetensors",
    "../Lora/cats",
    "/etc/passwd",
    "..\\cats",
    "cats.safetensors",
    "%2e%2e/cats",
)
SIZES = (
    "64",
    "512",
    "1024",
    "16384",
    "63",
    "16385",
    "-1",
    "0",
    "1e3",
    "nan",
    "",
    "9" * 400,
    "٥١٢",
    "512.5",
    " 512",
)
VALUES: tuple[Any, ...] = (
    True,
    False,
    None,
    1,
    0.5,
    float("nan"),
    10**400,
    [],
    {},
    [[]],
    {"a": []},
    b"x",
    "fp16",
)


def make(random: Random) -> Input:
    kind = random.choice(("inspect", "plan", "plan", "status", "arguments"))
    if kind == "arguments":
        return Input(
            rest=(kind, [_argument(random) for _ in range(random.choice((0, 1, 3, 3, 4, 4, 5, 50)))])
        )
    query: list[tuple[str, str]] = []
    for _ in range(random.choice((0, 1, 1, 1, 2, 4, 70))):
        lora = random.choice((*FILES, *PATHS)) if random.random() < 0.7 else name(random)[:2000]
        colon = random.choice(("", "", ":1", ":" + number(random)))
        query.append(("lora", lora + (colon if kind == "plan" else "")))
    for side in ("width", "height"):
        if random.random() < 0.4:
            query.append((side, random.choice(SIZES)))
    if random.random() < 0.1:
        query.append((name(random)[:100], name(random)[:100]))
    return Input(rest=(kind, [tuple(_sent(part) for part in pair) for pair in query]))


def _sent(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _argument(random: Random) -> Any:
    choices = ("Automatic", "bnb-nf4", "as set above", *COMPUTE_CHOICES, *PATCHERS, OURS)
    kinds = (True, random.choice(choices), random.choice(choices), random.choice(VALUES), name(random))
    return random.choice(kinds)


@contextmanager
def opened(folder: Path) -> Iterator[Check]:
    with webui(folder) as host, patched() as patch:
        checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
        bases, choices = bases_of(checkpoint), override.low_bits_choices()
        patch.setattr(host.shared.cmd_opts, "api", True, raising=False)
        patch.setattr(host.shared.cmd_opts, "api_auth", None, raising=False)
        patch.setattr(api, "check_arguments_of_requests", lambda: None)
        app = FastAPI()
        api.add_api(None, app)
        with TestClient(app, raise_server_exceptions=False) as client:

            def check(given: Input) -> bool:
                kind, asked = given.rest
                if kind == "arguments":
                    return _check_arguments(asked, choices, folder)
                with log() as console:
                    answer = client.get(f"{api.ROOT}/{kind}", params=asked)
                check_said(console.getvalue().replace(str(folder), ""), folder, lines=True)
                _check_answer(answer, folder)
                if bases_of(checkpoint) != bases:
                    raise Fault("the checkpoint is not what it was")
                return bool(answer.status_code == 200)

            yield check


def _check_arguments(asked: list[Any], choices: list[str], folder: Path) -> bool:
    found = problems(asked, choices)
    for sentence in found:
        check_said(sentence, folder)
    fields, wrong = wanted(asked, {}, choices)
    for sentence in wrong:
        check_said(sentence, folder)
    if wrong and fields:
        raise Fault(f"arguments that are wrong count as {fields}")
    return not found


def _check_answer(answer: Any, folder: Path) -> None:
    """A status that is documented, JSON that every client reads, no place of a file."""
    if answer.status_code not in STATUSES:
        raise Fault(f"the answer is {answer.status_code}: {answer.text[:300]!r}")
    found = json.loads(answer.text, parse_constant=_no_number)
    if str(folder) in answer.text or str(folder) in json.dumps(found, ensure_ascii=False):
        raise Fault(f"the answer has the path of a folder: {answer.text[:300]!r}")
    if "Traceback" in answer.text:
        raise Fault("the answer has a traceback")
    if answer.status_code != 200 and isinstance(found["detail"], str):
        check_said(found["detail"], folder)


def _no_number(text: str) -> None:
    raise Fault(f"the answer has {text}, which is no JSON")


TARGET = Target("api", make, opened)
