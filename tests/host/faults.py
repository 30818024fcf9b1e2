"""Faults, injected where LoRAs are set, attached, placed, streamed, and run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from lib_precision_lora.host import installation
from lib_precision_lora.host.generation.generations import Generations
from lib_precision_lora.host.generation.report import GenerationReport
from tests.host.images import Image, generate
from tests.host.webui import Host

KEPT = "what keeps patches"
"""Stands for the class that holds a prompt's LoRAs in a host."""

KEPT_BY_HOST = {
    "Forge": "lib_precision_lora.host.forge.patchers:KeptPatchers",
    "Forge Neo": "lib_precision_lora.host.neo.patches:KeptPatches",
}

SETTING: Mapping[str, str] = {
    "finding a file": "lib_precision_lora.host.loras.loading:find_network",
    "its version": "lib_precision_lora.host.loras.files:Stamp.of",
    "reading it": "lib_precision_lora.host.loras.files:LoraFiles.read",
    "the names of layers": "lib_precision_lora.host.loras.loading:key_map_of",
    "matching it": "lib_precision_lora.host.loras.loading:match_file",
    "the WebUI's entry": "networks:load_network",
    "the report of a file": "lib_precision_lora.host.loras.loading:report_file",
    "the log of a file": "lib_precision_lora.host.loras.loading:log_applied",
    "cloning patchers": f"{KEPT}.__init__",
    "beginning with patchers": f"{KEPT}.start",
    "adding to patchers": "lib_precision_lora.host.loras.kept:Kept.add",
    "adding to the host's patcher": f"{KEPT}.put",
    "using patchers": "lib_precision_lora.host.loras.loading:NetworkLoader._use",
    "showing notices": "lib_precision_lora.host.loras.loading:comment_once",
    "forgetting notices": "lib_precision_lora.host.generation.notices:Notices.begin",
    "trying again": "lib_precision_lora.host.loras.hosted:HostedSession.try_again",
    "the meter": "lib_precision_lora.branch.session.overhead:OverheadMeter.reset",
}
"""What `load_networks` does."""

REFRESHING: Mapping[str, str] = {
    "following": "lib_precision_lora.host.loras.hosted:HostedSession.follow",
    "dividing": "lib_precision_lora.host.loras.division:Division.divide",
    "what is refused": "lib_precision_lora.host.loras.hosted:unreadable",
    "what has changed": "lib_precision_lora.host.loras.hosted:flat",
    "the policy": "lib_precision_lora.host.loras.hosted:_policy",
    "the session": "lib_precision_lora.host.loras.following:Following.session",
    "the plan's refusals": "lib_precision_lora.host.reservation.memory:MemoryPlanner.left_out",
    "other models": "lib_precision_lora.host.loras.failures:ForwardFailures.elsewhere",
    "the record": "lib_precision_lora.host.generation.record:Pass.followed",
    "applying": "lib_precision_lora.branch:PatchSession.apply_patches",
    "effective weights": "lib_precision_lora.branch.session.session:effective_weights",
    "attachments": "lib_precision_lora.branch.session.session:make_attachments",
    "attaching": "lib_precision_lora.branch.session.session:attach",
    "watching": "lib_precision_lora.branch.session.overhead:OverheadMeter.watch",
}
"""What `refresh` does."""

PLACING: Mapping[str, str] = {
    "a stack": "lib_precision_lora.branch.forward.weight_branch:build_stack",
    "scales": "lib_precision_lora.branch.forward.weight_branch:column_scales",
    "phases": "lib_precision_lora.branch.forward.weight_branch:phases_of",
    "operands": "lib_precision_lora.branch.forward.weight_branch:WeightBranch._assemble",
    "a branch": "lib_precision_lora.branch.forward.weight_branch:WeightBranch.ready",
    "the choice of a product": "lib_precision_lora.branch.forward.weight_branch:choose_product",
    "where factors stay": "lib_precision_lora.branch.forward.weight_branch:WeightBranch.reside",
}
"""What placing does."""

STREAMING: Mapping[str, str] = {
    "bringing": "lib_precision_lora.branch.forward.streaming:FactorStream.bring",
    "setting out": "lib_precision_lora.branch.forward.streaming:FactorStream._depart",
    "copying": "lib_precision_lora.branch.forward.streaming:copied_to",
    "arriving": "lib_precision_lora.branch.forward.streaming:FactorStream._receive",
    "the order": "lib_precision_lora.branch.forward.streaming:FactorStream._following",
}
"""What a forward does for factors in RAM."""

RUNNING: Mapping[str, str] = {
    "operands of a forward": "lib_precision_lora.branch.forward.weight_branch:WeightBranch.operands",
    "chunks": "lib_precision_lora.branch.forward.linear:token_chunks",
    "the input side": "lib_precision_lora.branch.forward.linear:LinearInput.hidden",
    "the output side": "lib_precision_lora.branch.forward.rows:_additions",
    "a sum": "lib_precision_lora.branch.forward.rows:accumulate",
}
"""What a forward does."""


class InjectedError(Exception):
    """Of no kind that anybody would foresee."""


@contextmanager
def failing(where: str, wrong: Callable[..., bool] = lambda *args, **kwargs: True) -> Iterator[list[str]]:
    """`module:path` raises while the block runs, where `wrong` says so of its arguments; the list grows by
    one each time."""
    active = installation.active()
    if active is not None:
        where = where.replace(KEPT, KEPT_BY_HOST[active.host.name])
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    kept = vars(owner)[name]
    call, raised = getattr(owner, name), []

    def run(*args: Any, **kwargs: Any) -> Any:
        if wrong(*args, **kwargs):
            raised.append(where)
            raise InjectedError("no such luck")
        return call(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, staticmethod(run) if isinstance(kept, classmethod) else run)
        yield raised


def reported(host: Host, prompt: str, **options: Any) -> tuple[Image, GenerationReport]:
    """An image, and the report of its generation."""
    generations, p = Generations(), SimpleNamespace()
    generations.begin(p)
    image = generate(host, prompt, **options)
    report = generations.end(p, "Automatic")
    assert report is not None
    return image, report
