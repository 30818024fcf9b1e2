"""Where a parameter is read: the module to hook for it, and the branch that fits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lib_precision_lora.branch.forward.norm import is_norm
from lib_precision_lora.branch.forward.shadow import Shadow

Kind = Literal["linear", "conv", "embedding", "norm", "shadow"]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One parameter of a model.

    module: whose forward reads it; attribute: its name there; kind: how a patch of it runs. A parameter
    that is read around its module's forward is shadowed. parameter: the host's own, as it is now.
    """

    module: nn.Module
    attribute: str
    kind: Kind
    parameter: Tensor


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)`, in a tenth of its time where every name on the path is a module's own.

    Raises `AttributeError` where there is no such module.
    """
    found = model
    for name in path.split(".") if path else ():
        inner = found._modules.get(name)
        if inner is None:
            return model.get_submodule(path)
        found = inner
    return found


def find_parameter(model: nn.Module, name: str) -> str | None:
    """The parameter that a name stands for: itself, or the `weight` (or `scale`) of a module; or None."""
    for candidate in (name, f"{name}.weight", f"{name}.scale"):
        path, _, attribute = candidate.rpartition(".")
        try:
            owner = module_at(model, path)
        except AttributeError:
            continue
        if isinstance(owner._parameters.get(attribute), Tensor):
            return candidate
    return None


def find_site(model: nn.Module, name: str, shadows: Iterable[Shadow] = ()) -> Site:
    """The site of a parameter; name: as in `model.named_parameters()`.

    shadows: those that stand in the model; the host's own parameter is then the one behind them.
    """
    path, _, attribute = name.rpartition(".")
    owner = module_at(model, path)
    reader = _wrapped_embedding(owner, attribute) or owner
    present = getattr(reader, attribute)
    assert isinstance(present, Tensor)
    behind = (piece.original for piece in shadows if piece.stands_as(present, reader, attribute))
    return Site(reader, attribute, _kind(reader, attribute), next(behind, present))


def _kind(module: nn.Module, attribute: str) -> Kind:
    if attribute in ("weight", "bias"):
        if isinstance(module, nn.Embedding) and module.max_norm is None:
            return "embedding"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "conv"
        if _is_linear(module):
            return "linear"
    if attribute in ("weight", "bias", "scale") and is_norm(module):
        return "norm"
    return "shadow"


def _is_linear(module: nn.Module) -> bool:
    """A host's own linear layers are no `nn.Linear`, but are named so; the one that is read by attention
    around its forward is a subclass of another name."""
    return type(module) is nn.Linear or type(module).__name__.removeprefix("DynamicSwap_") in (
        "Linear",
        "Linear4bit",
        "LinearNF4",
        "LinearFP4",
    )


def _wrapped_embedding(owner: nn.Module, attribute: str) -> nn.Module | None:
    """The embedding behind a wrapper that repeats its weight under the same name, if it is one."""
    for child in owner.children():
        if isinstance(child, nn.Embedding) and not isinstance(owner, nn.Embedding):
            mine, its = getattr(owner, attribute, None), getattr(child, attribute, None)
            if isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.shape == its.shape:
                return child
    return None
