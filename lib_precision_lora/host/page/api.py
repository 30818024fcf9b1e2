"""The extension's own routes, beside those of the WebUI and behind the same credentials.

GET /precision-lora/v1/status            what is active, and what the last generation applied
GET /precision-lora/v1/inspect?lora=…    what a LoRA file holds, and what is wrong with it
GET /precision-lora/v1/plan?lora=…       what memory LoRAs would take beside the checkpoint that is loaded

They exist with `--api` alone. A LoRA is named as the WebUI lists it; where files lie is not told.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from lib_precision_lora import __version__
from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.generations import COMPUTE_NAMES, GENERATIONS
from lib_precision_lora.host.loras.files import FileProblem
from lib_precision_lora.host.page import api_models as models
from lib_precision_lora.host.page.arguments import problems
from lib_precision_lora.host.replacement import Replacement
from lib_precision_lora.host.reservation.prospect import ModelProspect, NoCheckpointError
from lib_precision_lora.plain_text import plain, sentence
from lib_precision_lora.report.inspect_file import UnreadableFileError, inspect_file
from lib_precision_lora.ui.accordion import TITLE

logger = logging.getLogger("lib_precision_lora")

ROOT = "/precision-lora/v1"
LONGEST_NAME = 260
MOST_LORAS = 64
LARGEST_SIDE = 16384

_one_inspection = threading.Lock()
"""A file is read whole: one at a time. Who asks meanwhile is told so: waiting would take the threads that the
WebUI answers its own requests with."""

_argument_check: Replacement | None = None


def add_api(_: Any, app: FastAPI) -> None:
    """The routes, where the WebUI was started with `--api`; arguments of the script are checked there."""
    from modules import shared

    if not shared.cmd_opts.api:
        return
    credentials = [Depends(check_credentials)] if shared.cmd_opts.api_auth else []
    routes: list[tuple[str, Callable[..., Any], Any, str]] = [
        ("status", get_status, models.Status, "What is active, and what the last generation applied"),
        ("inspect", get_inspection, models.Inspection, "What a LoRA file holds, and what is wrong with it"),
        ("plan", get_plan, models.LoraPlan, "What memory LoRAs would take beside the loaded checkpoint"),
    ]
    problem: dict[int | str, Any] = {"model": models.Problem}
    refusals: dict[str, dict[int | str, Any]] = {
        "inspect": {404: problem, 409: problem},
        "plan": {404: problem, 409: problem},
    }
    for name, endpoint, answer, summary in routes:
        app.add_api_route(
            f"{ROOT}/{name}",
            endpoint,
            methods=["GET"],
            response_model=answer,
            dependencies=credentials,
            summary=summary,
            tags=[TITLE],
            responses=refusals.get(name),
        )
    if installation.active() is not None or _takes_arguments():
        check_arguments_of_requests()


def _takes_arguments() -> bool:
    """Whether a WebUI that we do not know reads the arguments of scripts as the known ones do."""
    try:
        from modules.api.api import Api
    except ImportError:
        return False
    return hasattr(Api, "init_script_args")


def remove_api() -> None:
    """Leave the WebUI's own part as it was; the routes go with the WebUI's application."""
    global _argument_check
    if _argument_check is not None:
        _argument_check.undo()
        _argument_check = None


def check_arguments_of_requests() -> None:
    """Refuse a generation whose arguments for our script are no such arguments, before it is queued."""
    global _argument_check
    if _argument_check is not None:
        return
    from modules.api.api import Api

    from lib_precision_lora.host.generation import override

    def make(host_arguments: Callable[..., Any]) -> Callable[..., Any]:
        def init_script_args(api: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            for name, script in (request.alwayson_scripts or {}).items():
                if name.lower() != TITLE.lower() or not isinstance(script, dict) or "args" not in script:
                    continue
                off = installation.why_off()
                if off is not None:
                    raise HTTPException(422, off)
                given = script["args"]
                if not isinstance(given, list):
                    raise HTTPException(422, "Precision LoRA: args must be a list")
                wrong = problems(given, override.low_bits_choices())
                if wrong:
                    raise HTTPException(422, "; ".join(wrong))
            return host_arguments(api, request, *args, **kwargs)

        return init_script_args

    _argument_check = Replacement(Api, "init_script_args", make)


def check_credentials(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> None:
    """Those of `--api-auth`, in constant time for each user. Raises 401."""
    from modules import shared

    for entry in shared.cmd_opts.api_auth.split(","):
        user, _, password = entry.partition(":")
        same_user = secrets.compare_digest(given.username.encode(), user.encode())
        if secrets.compare_digest(given.password.encode(), password.encode()) and same_user:
            return
    raise HTTPException(401, "Incorrect username or password", {"WWW-Authenticate": "Basic"})


async def get_status() -> models.Status:
    """Reads values that nobody changes any more: any number of calls disturbs no generation."""
    active, last = installation.active(), GENERATIONS.last
    settings = None if active is None else active.settings()
    return models.Status(
        version=__version__,
        active=active is not None,
        enabled=settings is not None and settings.enabled,
        compute="" if settings is None else compute_name(settings.arithmetic.compute),
        last_generation=None if last is None else models.Generation(**last.to_json()),
    )


def compute_name(mode: str) -> str:
    return COMPUTE_NAMES.get(mode, mode)


def get_inspection(
    lora: Annotated[str, Query(min_length=1, max_length=LONGEST_NAME, description="as the WebUI lists it")],
) -> models.Inspection:
    """One file at a time: while another one is being read, the answer is 409."""
    path = find_lora(lora)
    if not _one_inspection.acquire(blocking=False):
        raise HTTPException(409, "Another LoRA is being inspected: ask again when that is done")
    try:
        found = inspect_file(path, pickles=False)
    except UnreadableFileError as error:
        raise HTTPException(422, sentence(str(error).replace(str(path), path.name))) from None
    except Exception:  # a damaged file can fail in any way; the log has it, the client need not
        logger.exception("inspecting LoRA %s failed", lora)
        said = f"Inspecting LoRA {plain(lora)} failed; the WebUI's log says why"
        raise HTTPException(500, said) from None
    finally:
        _one_inspection.release()
    return models.Inspection(**{**found.as_object(), "name": lora})


def get_plan(
    lora: Annotated[
        list[str],
        Query(
            max_length=MOST_LORAS,
            description="NAME:STRENGTH, or NAME at strength 1; repeated, in the prompt's order",
        ),
    ] = [],  # noqa: B006  without a default, Forge's FastAPI fails where none is given
    width: Annotated[int, Query(ge=64, le=LARGEST_SIDE, description="Of the image, pixels")] = 1024,
    height: Annotated[int, Query(ge=64, le=LARGEST_SIDE, description="Of the image, pixels")] = 1024,
) -> models.LoraPlan:
    """Plans for one image, as it would be generated now. Nothing is attached, moved or loaded; while the
    WebUI is at work, and its memory is changing, the answer is 409."""
    if not lora:
        raise HTTPException(422, "No LoRA is named: lora=NAME:STRENGTH, once for each")
    loras = [parse_lora(each) for each in lora]
    for name, _ in loras:
        find_lora(name)
    active = installation.active()
    if active is None or not active.settings().enabled:
        raise HTTPException(409, "Precision LoRA is switched off: LoRAs are the WebUI's, which plans nothing")
    try:
        with webui_idle():
            found = active.plan_for(loras, (width // 8) * (height // 8))
    except (NoCheckpointError, BusyError) as error:
        raise HTTPException(409, sentence(error)) from None
    except FileProblem as problem:
        raise HTTPException(422, sentence(problem)) from None
    except Exception:  # the host can fail in any way; the log has it, the client need not
        logger.exception("planning the memory of LoRAs failed")
        raise HTTPException(500, "Planning failed; the WebUI's log says why") from None
    return models.LoraPlan(
        diffusion_model=plan_of(found.diffusion_model),
        text_encoder=None if found.text_encoder is None else plan_of(found.text_encoder),
        together=plan_of(found.together),
    )


def plan_of(found: ModelProspect) -> models.ModelPlan:
    return models.ModelPlan(**dataclasses.asdict(found.plan), left_out=list(found.left_out))


def parse_lora(text: str) -> tuple[str, float]:
    """`NAME:STRENGTH` or `NAME`. Raises 422 for a strength that is no finite number."""
    name, colon, given = text.rpartition(":")
    if not colon:
        name, given = text, "1"
    try:
        strength = float(given)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise HTTPException(422, f"The strength of a LoRA must be a finite number, not {given[:40]!r}")
    if not 1 <= len(name) <= LONGEST_NAME:
        raise HTTPException(422, f"The name of a LoRA has 1 to {LONGEST_NAME} characters, not {len(name)}")
    return name, strength


class BusyError(RuntimeError):
    """The WebUI is at work."""


@contextmanager
def webui_idle() -> Iterator[None]:
    """In the WebUI's own queue, but only where nobody is in it: a generation that comes now waits for us.

    Raises `BusyError` at once where somebody is.
    """
    from modules.call_queue import queue_lock

    if not queue_lock.acquire(blocking=False):
        raise BusyError("The WebUI is at work: ask again when its queue is empty")
    try:
        yield
    finally:
        queue_lock.release()


def find_lora(name: str) -> Path:
    """The file that the WebUI lists under this name. Raises 404 for any other name, be it a path's or not."""
    import networks

    known = networks.available_networks
    if name not in known and name.lower() not in networks.forbidden_network_aliases:
        known = networks.available_network_aliases
    found = known.get(name)
    if found is None:
        raise HTTPException(404, "There is no LoRA of this name; name it as the WebUI's Lora tab does")
    return Path(found.filename)
