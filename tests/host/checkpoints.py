"""Small checkpoints with every kind of layer that matters to a LoRA, and what they compute exactly."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tests.host.webui import Host

TEXT_LAYER = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
WIDTH = 8


class Linear(nn.Module):
    """As the host's own: no `nn.Linear`; casts its weight in every forward.

    away: in low-memory mode the weight lies elsewhere (here: `meta`) and is fetched by the forward.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((0.3 * torch.randn(rows, columns)).to(dtype))
        self.bias = nn.Parameter(0.1 * torch.randn(rows))
        self.away: Tensor | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """What is swapped is not moved as a whole."""
        return self if self.away is not None else super()._apply(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.away is None else self.away
        return linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


class Block(nn.Module):
    """`x + mlp(tanh(attn(norm(x))))`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(torch.tanh(self.attn(self.norm(x))))


class DiffusionModel(nn.Module):
    """Tokens and a picture; `register` is read around any module's forward.

    control: how many channels of 0.5 somebody puts behind those of the tokens and of the picture, as a
    control image does.
    """

    config: Mapping[str, Any] = {}

    def __init__(self) -> None:
        super().__init__()
        self.control = (0, 0)
        self.img_in = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.low = Linear(WIDTH, WIDTH, torch.float8_e4m3fn)
        self.register = nn.Parameter(torch.randn(2, WIDTH))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1)])])

    def forward(self, tokens: Tensor, picture: Tensor, context: Tensor) -> Tensor:
        """An input layer that has been widened is always given as much as it has."""
        conv = self.input_blocks[0][0]
        widths = self.img_in.weight.shape[1], conv.weight.shape[1]
        more = [
            max(wide - x.shape[axis], extra)
            for wide, x, axis, extra in zip(widths, (tokens, picture), (-1, 1), self.control, strict=True)
        ]
        tokens = pad(tokens, (0, more[0]), value=0.5)
        picture = pad(picture, (0, 0, 0, 0, 0, more[1]), value=0.5)
        x = self.img_in(tokens) + context
        for block in self.blocks:
            x = block(x)
        x = torch.cat([self.low(x), self.register])
        return torch.cat([x.flatten(), conv(picture).flatten()])


class Model(nn.Module):
    """What the host's patcher holds. moves: how often it was told to go to a device."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.storage_dtype = self.computation_dtype = torch.float32
        self.predictor = SimpleNamespace(percent_to_sigma=float)
        self.config = SimpleNamespace(huggingface_repo="nobody/a-small-model")
        self.moves = 0

    def to(self, *args: Any, **kwargs: Any) -> Model:
        self.moves += 1
        return super().to(*args, **kwargs)

    def memory_required(self, input_shape: Sequence[int]) -> float:
        return 0.0


class TextEncoder(nn.Module):
    """One layer, under the name that CLIP-L's first one has."""

    def __init__(self) -> None:
        super().__init__()
        owner: nn.Module = self
        *path, last = TEXT_LAYER.removeprefix("clip_l.").split(".")
        for name in path:
            owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(last, nn.Linear(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(TEXT_LAYER.removeprefix("clip_l."))(x)


class SavedNames:
    """By which names Neo saves what a checkpoint consists of: those that Forge writes by itself."""

    def process_unet_state_dict_for_saving(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"model.diffusion_model.{name}": value for name, value in state.items()}

    def process_clip_state_dict_for_saving(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"text_encoders.{name}": value for name, value in state.items()}

    def process_vae_state_dict_for_saving(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"vae.{name}": value for name, value in state.items()}


class Checkpoint:
    """The host's engine, as far as LoRAs go. encodes: how often text conditioning was computed."""

    def __init__(self, host: Host, seed: int = 0, text_encoder: bool = True) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Model(DiffusionModel()).requires_grad_(False).eval()
            encoder = TextEncoder().requires_grad_(False)
        self.exact_model, self.exact_encoder = copy.deepcopy(model).double(), copy.deepcopy(encoder).double()
        self.host, self.encodes = host, 0
        for each in (model, encoder):
            host.contract.prepare(each)
        device, cpu = host.memory.get_torch_device(), torch.device("cpu")
        clip = host.clip.CLIP({"clip_l": encoder}, {}) if text_encoder else None
        unet = host.unet.UnetPatcher(model, load_device=device, offload_device=cpu)
        self.forge_objects = host.engine.ForgeObjects(unet=unet, clip=clip, vae=None, clipvision=None)
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.forge_objects_after_applying_lora = self.forge_objects.shallow_copy()
        self.current_lora_hash = str([])
        self.comments: list[str] = []
        self.extra_generation_params: dict[str, Any] = {}
        self.sd_checkpoint_info = f"checkpoint {seed}"
        self.model_config = SavedNames()
        self.is_inpaint = self.use_distilled_cfg_scale = self.use_shift = False
        self.is_sd1 = self.is_sdxl = self.is_wan = False

    @property
    def model(self) -> Any:
        return self.forge_objects_original.unet.model

    @property
    def encoder(self) -> Any:
        return self.forge_objects_original.clip.cond_stage_model

    def is_webui_legacy_model(self) -> bool:
        """Of whose convolutions Neo would make others where an image is to be tiled."""
        return False

    def set_clip_skip(self, clip_skip: int) -> None:
        """One layer has nothing to skip."""

    def get_learned_conditioning(self, texts: Sequence[str]) -> list[Tensor]:
        self.encodes += 1
        clip = self.forge_objects.clip
        if clip is None:
            return [torch.zeros(WIDTH) for _ in texts]
        self.host.memory.load_model_gpu(clip.patcher)
        return [clip.cond_stage_model.clip_l(numbers_of(text)) for text in texts]

    def exact(
        self, text: str, unet: Mapping[str, Tensor] | None = None, te: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The output in float64 for these weights (by name, those of the checkpoint where not named)."""
        encoder, context = self.exact_encoder, torch.zeros(WIDTH, dtype=torch.float64)
        if self.forge_objects_original.clip is not None:
            names = {name.removeprefix("clip_l."): value for name, value in (te or {}).items()}
            context = torch.func.functional_call(encoder, names, (numbers_of(text).double(),))
        names = {name.removeprefix("diffusion_model."): value for name, value in (unet or {}).items()}
        inputs = (TOKENS.double(), PICTURE.double(), context)
        return torch.func.functional_call(self.exact_model.diffusion_model, names, inputs)

    def weight(self, name: str) -> Tensor:
        """A pristine weight in float64; name: as in the model, or in the text encoder."""
        if name.startswith("clip_l."):
            return self.exact_encoder.get_parameter(name.removeprefix("clip_l."))
        return self.exact_model.get_parameter(name)


def numbers_of(text: str) -> Tensor:
    """The text's tokens, so to speak: four numbers."""
    generator = torch.Generator().manual_seed(zlib.crc32(text.strip().encode("utf-8", "surrogatepass")))
    return torch.randn(4, generator=generator)


TOKENS = torch.linspace(-1.0, 1.0, 3 * 6).view(3, 6)
PICTURE = torch.linspace(-1.0, 1.0, 4 * 4 * 4).view(1, 4, 4, 4)
