"""What tests look at in a host and its models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from tests.host.checkpoints import Checkpoint
from tests.host.webui import Host

LOGGER = "lib_precision_lora"


def swapped(host: Host) -> dict[str, Any]:
    """The functions of the host that we put ours in the place of."""
    return {name: getattr(owner, key) for name, (owner, key) in host.contract.swapped.items()}


def bases_of(checkpoint: Checkpoint) -> dict[str, tuple[int, bytes]]:
    """Identity and bytes of every parameter of the model and of the text encoder."""
    models = [checkpoint.model]
    if checkpoint.forge_objects_original.clip is not None:
        models.append(checkpoint.encoder)
    return {
        name: (id(value), value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for model in models
        for name, value in model.named_parameters()
    }


def bytes_of_bases(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Bytes of every parameter, whichever object holds them: the host's own merge makes new ones."""
    return {name: content for name, (_, content) in bases_of(checkpoint).items()}


def hooks_of(model: nn.Module) -> int:
    """How many hooks of any kind stand on the modules of a model."""
    return sum(
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_pre_hooks)
    )


def branches(model: nn.Module) -> int:
    """How many modules of a model have a branch."""
    timed = getattr(model, "diffusion_model", None)  # has a hook of the meter
    return sum(len(module._forward_hooks) for module in model.modules() if module is not timed)


def count_loads(host: Host, patch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by a patcher for every model that the host places."""
    loads: list[Any] = []
    owner, name = host.contract.placing
    load = getattr(owner, name)

    def counting(placed: Any, *args: Any, **kwargs: Any) -> Any:
        model = placed.model if isinstance(placed.model, nn.Module) else placed.model.model
        loads.append(type(model).__name__)
        return load(placed, *args, **kwargs)

    patch.setattr(owner, name, counting)
    return loads


@contextmanager
def log_lines(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Our log's lines of at least this level, while the block runs."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, listener = logging.getLogger(LOGGER), Listener(level)
    before = logger.level
    logger.addHandler(listener)
    logger.setLevel(min(level, before or level))
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(before)


def stacks(model: nn.Module) -> list[torch.Tensor]:
    """The stacked factors of every branch on a model that has run."""
    found = []
    for module in model.modules():
        for hook in module._forward_hooks.values():
            for cell in hook.__closure__ or ():
                stack = getattr(cell.cell_contents, "_stack", None)
                if stack is not None:
                    found += [stack.down, *stack.ups.values()]
    return found
