"""Tiny instances of the host's own models, in fp32 on the CPU, with random weights and a fixed input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.forge.real_forge import Forge
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
CHROMA_SIZES: Sizes = {
    "in_channels": 4,
    "vec_in_dim": 16,
    "context_in_dim": 24,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_out_dim": 64,
    "guidance_hidden_dim": 32,
    "guidance_n_layers": 2,
}
FLUX_SIZES: Sizes = {
    **{name: size for name, size in CHROMA_SIZES.items() if not name.startswith("guidance")},
    "guidance_embed": True,
}
SD3_SIZES: Sizes = {
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 16,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 24, "out_features": 128},
    },
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "qk_norm": "ln",
    "register_length": 2,
}
SD35_SIZES: Sizes = {**SD3_SIZES, "qk_norm": "rms", "register_length": 0, "x_block_self_attn_layers": [0]}
CLIP_SIZES: Sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 12,
    "eos_token_id": 49,
    "bos_token_id": 48,
    "pad_token_id": 49,
}
T5_SIZES: Sizes = {
    "num_layers": 2,
    "d_model": 32,
    "d_ff": 48,
    "num_heads": 2,
    "vocab_size": 50,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
}
IDS = torch.tensor([[48, 3, 17, 17, 9, 30, 49, 49], [48, 21, 4, 3, 40, 11, 2, 49]])


def unet(forge: Forge, sizes: Sizes) -> Tiny:
    """The U-Net of SD 1.5 and SDXL."""
    from backend.nn.unet import IntegratedUNet2DConditionModel

    def run(model: Any) -> Tensor:
        vector = values(2, 16) if "adm_in_channels" in sizes else None
        return model.diffusion_model(
            values(2, 4, 6, 4), torch.tensor([800.0, 20.0]), context=values(2, 5, 24), y=vector
        )

    model = build(forge, lambda: IntegratedUNet2DConditionModel.from_config(sizes))
    model._internal_dict = dict(sizes)
    return diffusion(forge, model, "runwayml/stable-diffusion-v1-5", run)


def flux(forge: Forge, sizes: Sizes = FLUX_SIZES) -> Tiny:
    from backend.nn.flux import IntegratedFluxTransformer2DModel

    model = build(forge, lambda: IntegratedFluxTransformer2DModel(**sizes))
    model.config = dict(sizes)
    return diffusion(forge, model, "black-forest-labs/FLUX.1-dev", run_flux)


def run_flux(model: Any) -> Tensor:
    return model.diffusion_model(
        values(1, 4, 8, 8),
        torch.tensor([0.7]),
        values(1, 5, 24),
        values(1, 16),
        guidance=torch.tensor([3.5]),
    )


def chroma(forge: Forge) -> Tiny:
    from backend.nn.chroma import IntegratedChromaTransformer2DModel

    def run(model: Any) -> Tensor:
        return model.diffusion_model(values(1, 4, 8, 8), torch.tensor([0.7]), values(1, 5, 24))

    model = build(forge, lambda: IntegratedChromaTransformer2DModel(**CHROMA_SIZES))
    model.config = dict(CHROMA_SIZES)
    return diffusion(forge, model, "lodestones/Chroma", run)


def mmdit(forge: Forge, sizes: Sizes) -> Tiny:
    """SD 3 and SD 3.5."""
    from backend.nn.mmditx import MMDiTX

    def run(model: Any) -> Tensor:
        return model.diffusion_model(
            values(1, 16, 8, 8), torch.tensor([400.0]), y=values(1, 16), context=values(1, 5, 24)
        )

    model = build(forge, lambda: MMDiTX(**sizes))
    model.config = dict(sizes)
    return diffusion(forge, model, "stabilityai/stable-diffusion-3-medium-diffusers", run)


def clip(forge: Forge, wrapped: bool) -> Tiny:
    """SDXL's two text encoders; wrapped: as they are after the host has set up textual inversion."""
    from backend.nn.clip import IntegratedCLIP
    from backend.text_processing.classic_engine import CLIPEmbeddingForTextualInversion
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(**CLIP_SIZES)
    encoders = {
        name: build(
            forge,
            lambda: IntegratedCLIP(CLIPTextModel, config, add_text_projection=True).eval(),
            manual_cast=True,
        )
        for name in ("clip_l", "clip_g")
    }
    if wrapped:
        for name, encoder in encoders.items():
            embeddings = encoder.transformer.text_model.embeddings
            embeddings.token_embedding = CLIPEmbeddingForTextualInversion(
                embeddings.token_embedding, SimpleNamespace(fixes=None), textual_inversion_key=name
            )

    def run(model: Any) -> Tensor:
        return torch.cat([run_clip(model, name, wrapped) for name in ("clip_l", "clip_g")], dim=1)

    return text_encoder(forge, encoders, run)


def run_clip(model: Any, name: str, textual_inversion: bool) -> Tensor:
    """Hidden states and pooled vector of one encoder, as the host's text engine takes them."""
    transformer = getattr(model, name).transformer
    if textual_inversion:
        word = SimpleNamespace(vec={"clip_l": values(2, 32), "clip_g": -values(2, 32)})
        transformer.text_model.embeddings.token_embedding.embeddings.fixes = [[(2, word)], []]
    outputs = transformer(IDS, output_hidden_states=True)
    hidden = transformer.text_model.final_layer_norm(outputs.hidden_states[-2])
    pooled = outputs.pooler_output
    if name == "clip_g":
        pooled = transformer.text_projection(pooled)
    return torch.cat([hidden, pooled[:, None]], dim=1)


def t5(forge: Forge) -> Tiny:
    from backend.nn.t5 import IntegratedT5

    encoder = build(forge, lambda: IntegratedT5(T5_SIZES), manual_cast=True)
    return text_encoder(forge, {"t5xxl": encoder}, lambda model: model.t5xxl.transformer(IDS))


def diffusion(forge: Forge, model: Any, repository: str, run: Run) -> Tiny:
    """The model in the host's own wrapper, as its patcher holds it."""
    from backend.modules.k_model import KModel

    model.storage_dtype = model.computation_dtype = torch.float32
    wrapper = KModel(
        model, None, k_predictor=nn.Identity(), config=SimpleNamespace(huggingface_repo=repository)
    )
    return Tiny(wrapper.requires_grad_(False), run, forge.lora.model_lora_keys_unet(wrapper, {}))


def text_encoder(forge: Forge, encoders: Mapping[str, nn.Module], run: Run) -> Tiny:
    model = forge.clip.JointTextEncoder(dict(encoders)).requires_grad_(False)
    return Tiny(model, run, forge.lora.model_lora_keys_clip(model, {}))


def build(forge: Forge, make: Callable[[], Any], manual_cast: bool = False) -> Any:
    """The model over the host's operations, with random weights loaded from a state dict.

    The host's linear layers know their shapes only from a state dict; a build over torch's own gives it.
    """
    from transformers.modeling_utils import no_init_weights

    state = random_state(make())
    to = {"device": torch.device("cpu"), "dtype": torch.float32}
    with (
        no_init_weights(),
        forge.operations.using_forge_operations(**to, manual_cast_enabled=manual_cast),
    ):
        model = make()
    model.load_state_dict(state)
    return model


TINY_MODELS: Mapping[str, Callable[[Forge], Tiny]] = {
    "SD 1.5": lambda forge: unet(forge, UNET_SIZES),
    "SDXL": lambda forge: unet(forge, SDXL_SIZES),
    "Flux": flux,
    "Chroma": chroma,
    "SD 3": lambda forge: mmdit(forge, SD3_SIZES),
    "SD 3.5": lambda forge: mmdit(forge, SD35_SIZES),
    "CLIP": lambda forge: clip(forge, wrapped=False),
    "CLIP with textual inversion": lambda forge: clip(forge, wrapped=True),
    "T5": t5,
}
