"""The budget of one of the host's models with a set of patches: what it needs, what its device has."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lib_precision_lora.branch import PatchError
from lib_precision_lora.branch.session.planning.footprint import Footprint
from lib_precision_lora.host.interface import Host, LoadRequest
from lib_precision_lora.host.loras.division import HostPatches, source_of
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.page.settings import Settings
from lib_precision_lora.memory import Plan, plan_budget
from lib_precision_lora.memory.allocator import allocated_bytes
from lib_precision_lora.memory.placement import streaming_bytes

logger = logging.getLogger("lib_precision_lora")

TEXT_TOKENS = 512
"""Tokens of a text encoder's longest input."""

Patches = HostPatches
"""All of a model's, or those of some of its files."""


class Budgeting:
    """Asks the host for its numbers and the session for its footprints.

    host: the WebUI; sessions: those that there are, by model; session: the one of a
    model, made where missing.
    """

    def __init__(
        self,
        host: Host,
        sessions: Mapping[nn.Module, HostedSession],
        session: Callable[[nn.Module], HostedSession],
        settings: Callable[[], Settings],
    ) -> None:
        self._host = host
        self._sessions = sessions
        self._session = session
        self._settings = settings

    def patches(self, patcher: Any) -> HostPatches:
        """Those that this patcher's model is to have."""
        return self._host.patches(patcher)

    def footprints(self, patcher: Any, patches: Patches) -> Mapping[str, Footprint]:
        """What each branch takes; a file that does not fit the model, which is said when it is attached,
        takes nothing."""
        while True:
            try:
                return self.sketch(patcher, patches)
            except PatchError as error:
                fewer = without(patches, {error.source})
                if len(fewer) == len(patches):
                    return {}
                patches = fewer

    def sketch(self, patcher: Any, patches: Patches) -> Mapping[str, Footprint]:
        """What each branch takes. Raises `PatchError` as attaching does."""
        return self._session(patcher.model).footprints(
            patcher.model,
            patches,
            self._settings().arithmetic,
            patcher.load_device,
            activation_type(patcher.model),
        )

    def budget(
        self,
        patcher: Any,
        footprints: Mapping[str, Footprint],
        request: LoadRequest,
    ) -> Plan:
        """The plan of one patcher with these footprints, among all that the host is about to load."""
        host, device, positions = self._host.memory, patcher.load_device, request.positions
        tokens = positions if positions and hasattr(patcher.model, "diffusion_model") else TEXT_TOKENS
        on_cpu = host.is_device_cpu(device)
        sizes = {name: allocated_bytes(each.factors) for name, each in footprints.items()}
        workspace = max((each.workspace_bytes(tokens) for each in footprints.values()), default=0)
        total = int(host.get_total_memory(device))
        inference = self.at_most_the_card(self._host.beside(request.required) + request.kept, device)
        if on_cpu:  # whose memory is not divided between a card and RAM
            return Plan("resident", sum(sizes.values()) + workspace, 0, sum(sizes.values()), 0, 0)
        return plan_budget(
            base_bytes=sum(self._host.size(each.model) for each in request.models),
            factor_bytes=sum(sizes.values()),
            workspace_bytes=workspace,
            inference_bytes=int(inference),
            margin_bytes=self._settings().margin_bytes,
            free_bytes=min(total, self._free_without_models(device)),
            total_bytes=total,
            streaming_bytes=streaming_bytes(sizes),
            stream_all=self._settings().stream_all,
        )

    def at_most_the_card(self, size: float, device: Any) -> float:
        """The request, or the card's size where it is larger, or no number at all."""
        total = self._host.memory.get_total_memory(device)
        if math.isfinite(size) and size <= total:
            return size
        return float(total)

    def attached(self, model: nn.Module) -> bool:
        """Whether anything of ours is on this model."""
        session = self._sessions.get(model)
        return session is not None and bool(session.attached)

    def placed(self, model: nn.Module) -> int:
        """Bytes of this model's factors that stand on the device."""
        session = self._sessions.get(model)
        return 0 if session is None else session.placed_bytes

    def _free_without_models(self, device: Any) -> int:
        """What is free once every model and every factor has left the device."""
        held = 0
        for loaded in self._host.loaded():
            if loaded.device == device:
                held += self._host.size(loaded.model.model, loaded.device)
                held += self.placed(loaded.model.model)
        return int(self._host.memory.get_free_memory(device)) + held


def without(patches: Patches, sources: set[str | None]) -> Patches:
    """The patches of all other files."""
    return {key: value for key, value in patches.items() if source_of(key) not in sources}


def activation_type(model: nn.Module) -> torch.dtype:
    """The type of the activations: text encoders of the host run in fp32."""
    dtype = getattr(model, "computation_dtype", torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
