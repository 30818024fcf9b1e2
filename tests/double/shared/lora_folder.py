"""The LoRA files on disk, by name, and what a prompt says of them."""

from __future__ import annotations

import os
from typing import Any

import network
from modules import shared

available_networks: dict[str, Any] = {}
available_network_aliases: dict[str, Any] = {}
forbidden_network_aliases: dict[str, int] = {}


def load_network(name: str, network_on_disk: Any) -> network.Network:
    net = network.Network(name, network_on_disk)
    net.mtime = os.path.getmtime(network_on_disk.filename)
    return net


def process_network_files(names: list[str] | None = None) -> None:
    files = shared.walk_files(shared.cmd_opts.lora_dir, allowed_extensions=[".pt", ".ckpt", ".safetensors"])
    for filename in files:
        name = os.path.splitext(os.path.basename(filename))[0]
        if names and name not in names:
            continue
        entry = network.NetworkOnDisk(name, filename)
        available_networks[name] = entry
        available_network_aliases[name] = entry


def update_available_networks_by_names(names: list[str]) -> None:
    process_network_files(names)


def list_available_networks() -> None:
    available_networks.clear()
    available_network_aliases.clear()
    forbidden_network_aliases.clear()
    forbidden_network_aliases.update({"none": 1, "Addams": 1})
    process_network_files()


def strengths_in(params_list: Any) -> tuple[list[str], list[float], list[float]]:
    """Names, and strengths in text encoders and model: one stands for both; `te=` and `unet=` name them."""
    names, te_multipliers, unet_multipliers = [], [], []
    for params in params_list:
        positional = params.positional
        te = float(params.named.get("te", positional[1] if len(positional) > 1 else 1.0))
        unet = float(params.named.get("unet", positional[2] if len(positional) > 2 else te))
        names.append(positional[0])
        te_multipliers.append(te)
        unet_multipliers.append(unet)
    return names, te_multipliers, unet_multipliers


def write_hashes(p: Any, loaded_networks: list[Any]) -> None:
    """Into the infotext."""
    if loaded_networks:
        p.extra_generation_params["Lora hashes"] = ", ".join(
            f"{net.mentioned_name}: {net.network_on_disk.shorthash}" for net in loaded_networks
        )
