"""`<lora:name:te:unet>` in prompts."""

from __future__ import annotations

from typing import Any

import networks
from modules import extra_networks


class ExtraNetworkLora(extra_networks.ExtraNetwork):
    """One strength stands for both; `te=` and `unet=` name them."""

    def __init__(self) -> None:
        super().__init__("lora")

    def activate(self, p: Any, params_list: Any) -> None:
        names, te_multipliers, unet_multipliers = [], [], []
        for params in params_list:
            positional = params.positional
            te = float(params.named.get("te", positional[1] if len(positional) > 1 else 1.0))
            unet = float(params.named.get("unet", positional[2] if len(positional) > 2 else te))
            names.append(positional[0])
            te_multipliers.append(te)
            unet_multipliers.append(unet)
        networks.load_networks(names, te_multipliers, unet_multipliers, [None] * len(names))
        if networks.loaded_networks:
            p.extra_generation_params["Lora hashes"] = ", ".join(
                f"{net.mentioned_name}: {net.network_on_disk.shorthash}" for net in networks.loaded_networks
            )
