"""`<kind:name:strength>` in prompts."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from modules import errors

extra_network_registry: dict[str, ExtraNetwork] = {}


class ExtraNetworkParams:
    """What stands between the brackets; equal where the items are."""

    def __init__(self, items: Any = None) -> None:
        self.items = items or []
        parts = [str(item).split("=", 2) for item in self.items]
        self.positional = [item for item, part in zip(self.items, parts, strict=True) if len(part) != 2]
        self.named = {part[0]: part[1] for part in parts if len(part) == 2}

    def __eq__(self, other: Any) -> bool:
        return self.items == other.items


class ExtraNetwork:
    """One kind."""

    def __init__(self, name: str) -> None:
        self.name = name

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        raise NotImplementedError


def register_extra_network(extra_network: Any) -> None:
    extra_network_registry[extra_network.name] = extra_network


def parse_prompts(prompts: list[str]) -> tuple[list[str], Any]:
    """The prompts without brackets, and the first one's networks by kind."""
    found = [re.findall(r"<(\w+):([^>]+)>", prompt) for prompt in prompts]
    networks: defaultdict[str, list[ExtraNetworkParams]] = defaultdict(list)
    for kind, content in found[0]:
        networks[kind].append(ExtraNetworkParams(items=content.split(":")))
    return [re.sub(r"<(\w+):([^>]+)>", "", prompt) for prompt in prompts], networks


def activate(p: Any, extra_network_data: Any) -> None:
    """Every kind, also without any in the prompt. An exception is displayed; the generation goes on."""
    for name, network in extra_network_registry.items():
        try:
            network.activate(p, extra_network_data.get(name, []))
        except Exception as error:  # noqa: BLE001  as the host does
            errors.display(error, f"activating extra network {name}")
