"""What a model would show of us: its parameters as objects and bytes, hooks and attributes of its modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_hooks_always_called")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter, held, so that no other object can take its identity."""
    return dict(model.named_parameters())


def kept_objects(model: nn.Module, before: Mapping[str, nn.Parameter]) -> set[str]:
    """The names under which the same objects stand as before."""
    return {name for name, parameter in model.named_parameters() if before.get(name) is parameter}


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer, as it is stored."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: raw_bytes(tensor.data) for name, tensor in tensors.items()}


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def hooks_of(model: nn.Module) -> int:
    """How many hooks that run with a forward stand on the modules."""
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def attributes_of(model: nn.Module) -> dict[str, set[str]]:
    """The names that each module holds: parameters, buffers, submodules and all else."""
    return {
        name: {*vars(module), *module._parameters, *module._buffers, *module._modules}
        for name, module in model.named_modules()
    }
