"""What differs between the hosts where tests look at it: how each keeps patches, and merges by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tests.host.neo_layers import cast_on_the_fly

if TYPE_CHECKING:
    from tests.host.checkpoints import Checkpoint

Modules = Mapping[str, ModuleType]
ENDINGS = {"up": "lora_up.weight", "down": "lora_down.weight"}


class Contract(ABC):
    """Of one host. modules: its own, by name; name: as in `FORGE_ROOT` and `NEO_ROOT`, in small letters;
    same_twice_adds: whether the host counts a file twice that stands in a prompt twice at one strength;
    keeps_objects: whether the host puts the same objects back after a merge; kept: the argument of its
    `load_models_gpu` for what is to stay free beside the weights."""

    name: str
    same_twice_adds: bool
    keeps_objects: bool
    kept: str
    preset: Mapping[str, Any] = {}
    """What its `checkpoint_change` is given besides."""

    def __init__(self, modules: Modules) -> None:
        self.modules = modules

    @property
    def swapped(self) -> dict[str, tuple[Any, str]]:
        """The functions of the host that we put ours in the place of: owner and name."""
        memory = self.modules["backend.memory_management"]
        processing = self.modules["modules.processing"]
        return {
            "load_models_gpu": (memory, "load_models_gpu"),
            "model_load": (memory.LoadedModel, "model_load"),
            "model_unload": (memory.LoadedModel, "model_unload"),
            "load_networks": (self.modules["networks"], "load_networks"),
            "cached_params": (processing.StableDiffusionProcessing, "cached_params"),
        }

    def patch_value(self, **tensors: Tensor) -> Any:
        """A patch as the host makes it of a file's tensors, by the endings of their keys ("_" for ".")."""
        named = {f"layer.{ENDINGS.get(key, key)}": value for key, value in tensors.items()}
        patches, rest = self.modules["backend.patcher.lora"].load_lora(named, {"layer": "layer.weight"})
        assert not rest
        return patches["layer.weight"]

    @property
    @abstractmethod
    def placing(self) -> tuple[Any, str]:
        """The method by which the host moves a model's weights to the device: owner and name."""

    def prepare(self, model: nn.Module) -> None:  # noqa: B027  Forge takes any layers
        """Give a new model the layers that the host's own have."""

    @abstractmethod
    def online(self, checkpoint: Checkpoint) -> int:
        """Modules of the model into which the host merges anew in every forward."""

    @abstractmethod
    def merged(self, checkpoint: Checkpoint) -> set[str]:
        """The parameters of model and text encoder into which the host has merged something."""

    @abstractmethod
    def stored(self, weight: Tensor, like: Any, name: str) -> Tensor:
        """A merged weight in fp32, as the host then stores it in this type."""

    def forget_files(self) -> None:  # noqa: B027  a host may keep none
        """As if the host had read no file yet."""

    def loading_arguments(self) -> dict[str, Any]:
        """What the loading options say at this moment."""
        arguments = self.modules["backend.args"].dynamic_args
        found = arguments if isinstance(arguments, dict) else vars(arguments)
        return {name: value for name, value in found.items() if not name.startswith("__")}


class ForgeContract(Contract):
    name = "forge"
    same_twice_adds = False
    keeps_objects = True
    kept = "hard_memory_preservation"

    @property
    def swapped(self) -> dict[str, tuple[Any, str]]:
        loader = self.modules["backend.patcher.lora"].LoraLoader
        return {"refresh": (loader, "refresh"), **super().swapped}

    @property
    def placing(self) -> tuple[Any, str]:
        return self.modules["backend.memory_management"].LoadedModel, "model_load"

    def online(self, checkpoint: Checkpoint) -> int:
        return sum(hasattr(module, "forge_online_loras") for module in checkpoint.model.modules())

    def merged(self, checkpoint: Checkpoint) -> set[str]:
        found = set(checkpoint.model.lora_loader.backup)
        if checkpoint.forge_objects_original.clip is not None:
            found |= set(checkpoint.encoder.lora_loader.backup)
        return found

    def stored(self, weight: Tensor, like: Any, name: str) -> Tensor:
        return weight.to(like)

    def forget_files(self) -> None:
        self.modules["networks"].load_lora_state_dict.cache_clear()


class NeoContract(Contract):
    """A merged layer that is put back is another parameter with the same bytes."""

    name = "neo"
    same_twice_adds = True
    keeps_objects = False
    kept = "minimum_memory_required"
    preset: Mapping[str, Any] = {"preset": None}

    def prepare(self, model: nn.Module) -> None:
        cast_on_the_fly(model)

    @property
    def placing(self) -> tuple[Any, str]:
        """Its `model_load` is called for every image, and then finds that nothing has changed."""
        return self.modules["backend.patcher.base"].ModelPatcher, "load"

    def online(self, checkpoint: Checkpoint) -> int:
        functions = ("weight_function", "bias_function")
        modules = checkpoint.model.modules()
        return sum(any(getattr(module, name, None) for name in functions) for module in modules)

    def merged(self, checkpoint: Checkpoint) -> set[str]:
        """Every clone of a patcher has the same `backup`."""
        objects = checkpoint.forge_objects_original
        patchers = [objects.unet, *([] if objects.clip is None else [objects.clip.patcher])]
        return {key for patcher in patchers for key in patcher.backup}

    def stored(self, weight: Tensor, like: Any, name: str) -> Tensor:
        seed = self.modules["backend.patcher.lora"].string_to_seed(name)
        rounded: Tensor = self.modules["backend.float"].stochastic_rounding(weight, like, seed=seed)
        return rounded


CONTRACTS: Mapping[str, type[Contract]] = {"forge": ForgeContract, "neo": NeoContract}
