"""Tiny instances of Neo's own models, in fp32 on the CPU, with random weights and a fixed input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.neo.real_neo import Neo
from tests.tiny import Run, Sizes, Tiny, random_state, values

UNET_SIZES: Sizes = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "num_heads": 2,
    "context_dim": 24,
    "use_spatial_transformer": True,
}
SDXL_SIZES: Sizes = {
    **UNET_SIZES,
    "channel_mult": [1, 2],
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 16,
}
FLUX_SIZES: Sizes = {
    "in_channels": 4,
    "out_channels": 4,
    "vec_in_dim": 16,
    "context_in_dim": 24,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
FLUX2_SIZES: Sizes = {
    **FLUX_SIZES,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "depth": 2,
    "depth_single_blocks": 2,
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
}
CHROMA_SIZES: Sizes = {
    **{name: size for name, size in FLUX_SIZES.items() if name != "guidance_embed"},
    "in_channels": 16,
    "out_channels": 16,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 32,
    "n_layers": 2,
    "txt_ids_dims": [],
}
LUMINA_SIZES: Sizes = {
    "patch_size": 2,
    "in_channels": 4,
    "dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 2.0,
    "qk_norm": True,
    "cap_feat_dim": 24,
    "axes_dims": [8, 12, 12],
    "axes_lens": [32, 32, 32],
}
Z_IMAGE_SIZES: Sizes = {
    **LUMINA_SIZES,
    "dim": 256,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 0.5,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
QWEN_SIZES: Sizes = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 12, 12),
}
WAN_SIZES: Sizes = {
    "model_type": "t2v",
    "in_dim": 4,
    "dim": 64,
    "ffn_dim": 96,
    "freq_dim": 32,
    "text_dim": 24,
    "out_dim": 4,
    "num_heads": 2,
    "num_layers": 2,
}
ANIMA_SIZES: Sizes = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "crossattn_emb_channels": 24,
    "adaln_lora_dim": 16,
    "num_blocks": 2,
    "num_heads": 2,
}
ERNIE_SIZES: Sizes = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
    "ffn_hidden_size": 96,
    "in_channels": 4,
    "out_channels": 4,
    "text_in_dim": 24,
    "rope_axes_dim": (8, 12, 12),
}
KREA_SIZES: Sizes = {
    "features": 64,
    "tdim": 32,
    "txtdim": 24,
    "heads": 2,
    "kvheads": 1,
    "multiplier": 2,
    "layers": 2,
    "channels": 4,
    "txtlayers": 3,
    "txtheads": 2,
    "txtkvheads": 2,
}
ENCODER_SIZES: Sizes = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""Of Anima's text encoder, Qwen 3 with 0.6 billion parameters."""

CONTEXT = 1, 5, 24


def unet(neo: Neo, sizes: Sizes) -> Tiny:
    """The U-Net of SD 1.5 and SDXL."""
    from backend.nn.unet import IntegratedUNet2DConditionModel

    def run(model: Any) -> Tensor:
        vector = values(2, 16) if "adm_in_channels" in sizes else None
        return model.diffusion_model(
            values(2, 4, 6, 4), torch.tensor([800.0, 20.0]), context=values(2, 5, 24), y=vector
        )

    model = build(neo, lambda: IntegratedUNet2DConditionModel.from_config(sizes))
    model._internal_dict = dict(sizes)
    return wrapped(neo, model, "runwayml/stable-diffusion-v1-5", run)


def flux(neo: Neo) -> Tiny:
    from backend.nn.flux import IntegratedFluxTransformer2DModel as Flux

    def run(model: Any) -> Tensor:
        return model.diffusion_model(
            values(1, 4, 8, 8),
            torch.tensor([0.7]),
            values(*CONTEXT),
            values(1, 16),
            guidance=torch.tensor([3.5]),
        )

    return diffusion(neo, Flux, FLUX_SIZES, "black-forest-labs/FLUX.1-dev", run)


def flux2(neo: Neo) -> Tiny:
    from backend.nn.flux import IntegratedFluxTransformer2DModel as Flux

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 16, 4, 4), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, Flux, FLUX2_SIZES, "black-forest-labs/FLUX.2-klein-4B", run)


def chroma(neo: Neo) -> Tiny:
    from backend.nn.chroma import IntegratedChromaTransformer2DModel as Chroma

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 8, 8), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, Chroma, CHROMA_SIZES, "Chroma", run)


def lumina(neo: Neo, sizes: Sizes, repository: str) -> Tiny:
    """Lumina 2 and Z-Image; neither the prompt nor the image fills a multiple of Z-Image's tokens."""
    from backend.nn.lumina import NextDiT

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 8, 6), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, NextDiT, sizes, repository, run)


def qwen(neo: Neo) -> Tiny:
    from backend.nn.qwen import QwenImageTransformer2DModel

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 1, 8, 6), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, QwenImageTransformer2DModel, QWEN_SIZES, "Qwen/Qwen-Image", run)


def wan(neo: Neo, **sizes: Any) -> Tiny:
    """Wan 2.1 and 2.2; image: that of Wan 2.1 which sees its first image through CLIP."""
    from backend.nn.wan import WanModel

    def run(model: Any) -> Tensor:
        image = values(1, 3, 1280) if "model_type" in sizes else None
        return model.diffusion_model(
            values(1, 4, 2, 8, 6), torch.tensor([0.7]), values(*CONTEXT), clip_fea=image
        )

    return diffusion(neo, WanModel, {**WAN_SIZES, **sizes}, "Wan-AI/Wan2.1-T2V-14B", run)


def anima(neo: Neo) -> Tiny:
    from backend.nn.anima import Anima

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 1, 8, 6), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, Anima, ANIMA_SIZES, "circlestone-labs/Anima", run)


def ernie(neo: Neo) -> Tiny:
    from backend.nn.ernie import ErnieImageModel

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 4, 6), torch.tensor([0.7]), values(*CONTEXT))

    return diffusion(neo, ErnieImageModel, ERNIE_SIZES, "baidu/ERNIE-Image", run)


def krea(neo: Neo) -> Tiny:
    from backend.nn.krea import SingleStreamDiT

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 8, 6), torch.tensor([0.7]), values(1, 5, 72))

    return diffusion(neo, SingleStreamDiT, KREA_SIZES, "krea/Krea-2-Raw", run)


def anima_encoder(neo: Neo) -> Tiny:
    """Anima's text encoder, in which Neo keeps the adapter that its checkpoint has in the transformer."""
    from backend.nn import anima
    from backend.nn.llm import llama

    config = type("Config", (llama.Qwen3_06BConfig,), {"head_dim": ENCODER_SIZES["head_dim"]})
    small = {name: size for name, size in ENCODER_SIZES.items() if name != "head_dim"}
    adapter = partial(anima.LLMAdapter, source_dim=32, target_dim=24, model_dim=24, num_layers=1, num_heads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "Qwen3_06BConfig", partial(config, **small))
        patch.setattr(llama, "LLMAdapter", adapter)
        state = random_state(with_torchs_norms(lambda: llama.Qwen3_06B({})))
        encoder = build(neo, lambda: llama.Qwen3_06B({}), state, manual_cast=True)

    def run(model: Any) -> Tensor:
        encoder = model.qwen3_06b
        embeds = encoder.get_input_embeddings()(torch.tensor([[3, 17, 17, 9, 30]]))
        hidden, *_ = encoder(None, embeds=embeds, attention_mask=torch.ones(1, 5))
        return encoder.preprocess_text_embeds(hidden, torch.tensor([[5, 20003, 77, 1]]))

    model = neo.clip.JointTextEncoder({"qwen3_06b": encoder}).requires_grad_(False)
    return Tiny(model, run, neo.lora.model_lora_keys_clip(model, {}))


def diffusion(neo: Neo, make: Callable[..., nn.Module], sizes: Sizes, repository: str, run: Run) -> Tiny:
    model = build(neo, lambda: make(**sizes))
    model.config = dict(sizes)
    return wrapped(neo, model, repository, run)


def wrapped(neo: Neo, model: Any, repository: str, run: Run) -> Tiny:
    """The model in the host's own wrapper, as its patcher holds it."""
    from backend.args import dynamic_args
    from backend.modules.k_model import KModel

    model.storage_dtype = model.computation_dtype = torch.float32
    dynamic_args.ops = dynamic_args.ops or ""
    wrapper = KModel(
        model, None, k_predictor=nn.Identity(), config=SimpleNamespace(huggingface_repo=repository)
    )
    return Tiny(wrapper.requires_grad_(False), run, neo.lora.model_lora_keys_unet(wrapper, {}))


def with_torchs_norms(make: Callable[[], Any]) -> Any:
    """What is made, where norms are given an argument that only the host's have."""

    class RMSNorm(nn.RMSNorm):
        def __init__(self, *args: Any, add: bool = False, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "RMSNorm", RMSNorm)
        return make()


def build(
    neo: Neo,
    make: Callable[[], Any],
    state: Mapping[str, Tensor] | None = None,
    manual_cast: bool = False,
) -> Any:
    """The model over the host's operations, with weights loaded from a state dict, random ones where None.

    The host's linear layers know their shapes only from a state dict; a build over torch's own gives it.
    """
    from transformers.modeling_utils import no_init_weights

    state = random_state(make()) if state is None else state
    to = {"device": torch.device("cpu"), "dtype": torch.float32}
    with no_init_weights(), neo.operations.using_forge_operations(**to, manual_cast_enabled=manual_cast):
        model = make()
    model.load_state_dict(state)
    return model


TINY_MODELS: Mapping[str, Callable[[Neo], Tiny]] = {
    "SD 1.5": lambda neo: unet(neo, UNET_SIZES),
    "SDXL": lambda neo: unet(neo, SDXL_SIZES),
    "Flux": flux,
    "Flux 2": flux2,
    "Chroma": chroma,
    "Lumina 2": lambda neo: lumina(neo, LUMINA_SIZES, "neta-art/Neta-Lumina"),
    "Z-Image": lambda neo: lumina(neo, Z_IMAGE_SIZES, "Tongyi-MAI/Z-Image-Turbo"),
    "Qwen-Image": qwen,
    "Wan": wan,
    "Wan with CLIP": lambda neo: wan(neo, model_type="i2v"),
    "Anima": anima,
    "Anima's text encoder": anima_encoder,
    "Ernie-Image": ernie,
    "Krea 2": krea,
}
