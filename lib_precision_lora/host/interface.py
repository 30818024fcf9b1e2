"""What a WebUI must answer, so that the rest of `host/` works in it. A further WebUI is a further folder.

A *patcher* is the WebUI's handle of one model: it has `.model` and `.load_device`. An *engine* is a
checkpoint that is loaded, with the patchers of its diffusion model and its text encoders. `memory` and `lora`
are modules of the WebUI; of them is used what has the same name and meaning in every host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from lib_precision_lora.host.loras.division import HostPatches
from lib_precision_lora.host.loras.kept import Kept
from lib_precision_lora.host.replacement import Replacement

Merge = Callable[[HostPatches], None]
"""The host's own way: brings a model to these patches by merging them; raises where it cannot."""

Parse = Callable[[Mapping[str, Tensor], Mapping[str, Any]], tuple[dict[Any, Any], dict[str, Tensor]]]
"""The host's own reader: patches for these names, and the tensors that it does not understand either."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadRequest:
    """What the host is about to place.

    models: its patchers; required: bytes that they need to run; kept: bytes that are to stay free beside
    that; positions: of the latent image, None where it is not known.
    """

    models: Sequence[Any]
    required: float = 0.0
    kept: float = 0.0
    positions: int | None = None


class Follower(Protocol):
    """What a host's own functions call when they place, move or run a model."""

    def bring(self, model: nn.Module, patches: HostPatches, merge: Merge) -> None:
        """Bring a model to these patches, beside its weights."""

    def stand_back_from(self, model: nn.Module) -> bool:
        """Take everything of ours off this model; whether there was something."""

    def load(
        self,
        request: LoadRequest,
        place: Callable[[float, float], None],
    ) -> None:
        """Plan the request, have the host `place(required, kept)` with room for factors, and attach."""

    def release(self, model: Any) -> None:
        """A model leaves its device."""

    def unmerge(self, model: Any) -> bool:
        """A model is about to be placed layer by layer; whether merged layers were put back for that."""

    @property
    def enabled(self) -> bool:
        """Whether LoRAs are ours to apply at this moment."""


class Host(ABC):
    """name: for messages; memory: the WebUI's `memory_management`; lora: the module with its key maps;
    samplers: the modules in which `sampling_prepare` is called; gives_way: whether a model that is loaded
    makes room by itself where more is to be kept free; applies_once: whether it applies the same file at the
    same strength once, however often a prompt names it."""

    name: str
    memory: Any
    lora: Any
    samplers: Sequence[Any]
    gives_way: bool
    applies_once: bool

    def loaded(self) -> list[Any]:
        """The host's entries of loaded models whose patcher is still there: a host may hold it weakly."""
        return [each for each in self.memory.current_loaded_models if each.model is not None]

    @abstractmethod
    def patches(self, patcher: Any) -> HostPatches:
        """Those that this patcher's model is to have, in our format."""

    @abstractmethod
    def takes_loras(self, patcher: Any) -> bool:
        """Whether it is the handle of a model that LoRAs may concern."""

    @abstractmethod
    def follow(self, patcher: Any) -> None:
        """Have `Follower.bring` called for this patcher's model."""

    @abstractmethod
    def keep(self, engine: Any) -> Kept:
        """An empty set of LoRAs for this checkpoint."""

    @abstractmethod
    def use(self, engine: Any, kept: Kept | None) -> None:
        """Make these LoRAs (none where None) those that the checkpoint is sampled with."""

    @abstractmethod
    def forget(self, model: nn.Module) -> None:
        """Nothing of ours is on this model any more: the host is to build its own patches at its next
        chance."""

    @abstractmethod
    def put_aside(self, model: nn.Module, name: str) -> Tensor | None:
        """The checkpoint's own parameter of this name, where the host's merge stands in its place."""

    @abstractmethod
    def parse(self, state_dict: Mapping[str, Tensor], names: Mapping[str, Any]) -> Any:
        """As `Parse`."""

    @abstractmethod
    def leaves_to_host(self, engine: Any) -> str | None:
        """Why the LoRAs of this checkpoint are the WebUI's own to apply; None where they are ours."""

    def quantized_product(self, module: nn.Module) -> bool | None:
        """Whether this layer multiplies its quantized weight with a quantized input, as it stands now; None
        for a layer that can do it in one way only."""
        return None

    @abstractmethod
    def size(self, model: nn.Module, device: Any = None) -> int:
        """Bytes of a model; device: of what stands there alone."""

    @abstractmethod
    def beside(self, required: float) -> float:
        """Bytes that the host keeps free of weights where a model needs so many to run."""

    @abstractmethod
    def replacements(self, follower: Follower) -> list[Replacement]:
        """What is swapped in this host alone."""


def patchers_of(engine: Any) -> list[Any]:
    """The patchers of a checkpoint's model and text encoder."""
    objects = getattr(engine, "forge_objects", None)
    if objects is None:
        return []
    return [objects.unet, *([] if objects.clip is None else [objects.clip.patcher])]
