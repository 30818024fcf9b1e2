"""Nunchaku's layers, which stay the host's: their weight is a quantized part and a low-rank part in kernels'
own order, and the host gives them LoRAs by file name."""

from __future__ import annotations

from torch import Tensor, nn

from .weight import StorageError


def refuse_nunchaku(parameter: Tensor, module: nn.Module | None) -> None:
    """Raise StorageError for any parameter of a module that holds `qweight` and `wscales`."""
    if getattr(module, "qweight", None) is None or getattr(module, "wscales", None) is None:
        return
    raise StorageError(
        f"A {type(module).__name__} is Nunchaku's (SVDQuant, AWQ), whose weights only its own kernels read; "
        "LoRAs on it stay the WebUI's own."
    )
