"""A small SD 1.5 checkpoint with random weights, and LoRA files for it.

python -m tests.running.checkpoint ROOT OUT   writes the checkpoint, by the classes of Forge or Forge Neo

The UNet has one attention block at each of two levels instead of twelve; VAE and CLIP have their full size,
because Forge builds those two from its own configuration files, whatever the checkpoint holds. All UNet
weights are values of float8 e4m3, so that the checkpoint is the same function whether Forge stores it in
fp32 or in that format: the first is the reference for the second.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[2]
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
CLIP_LAYERS = CLIP + "text_model.encoder.layers."


def make_checkpoint(host_root: Path, out: Path) -> None:
    """Write the checkpoint with the classes of this Forge, outside the calling process."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.running.checkpoint", str(host_root), str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_lora(checkpoint: Path, rank: int, seed: int, size: float = 0.5) -> dict[str, Tensor]:
    """A LoRA in kohya's names for each attention layer, some 3×3 convolutions and CLIP's linear layers.

    Each `Δ = alpha/rank · up · down` has `size` times the Frobenius norm of its weight; alpha = rank / 2.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, weight in safetensors.torch.load_file(checkpoint).items():
        name = _lora_name(key, weight)
        if name is None:
            continue
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
        up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator)
        delta = 0.5 * up.flatten(1) @ down.flatten(1)
        up *= size * weight.float().norm() / delta.norm()
        tensors[f"{name}.lora_down.weight"] = down.half().contiguous()
        tensors[f"{name}.lora_up.weight"] = up.half().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def save_lora(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(dict(tensors), path, metadata={"ss_base_model_version": "sd_v1"})


def _lora_name(key: str, weight: Tensor) -> str | None:
    """The LoRA name of a checkpoint's weight; None for one that the LoRAs leave as it is."""
    if not key.endswith(".weight") or weight.ndim < 2:
        return None
    if key.startswith(CLIP_LAYERS):
        return "lora_te_" + key.removeprefix(CLIP).removesuffix(".weight").replace(".", "_")
    attention = ".transformer_blocks." in key or ".proj_in." in key or ".proj_out." in key
    convolution = ".in_layers.2." in key or key.endswith(".op.weight")
    if key.startswith(UNET) and (attention or convolution):
        return "lora_unet_" + key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")
    return None


def _write(host_root: Path, out: Path) -> None:
    neo = host_root / "modules_forge/packages"
    sys.argv = [sys.argv[0], "--cpu" if neo.is_dir() else "--always-cpu"]
    packages = neo if neo.is_dir() else host_root / "packages_3rdparty"
    sys.path[:0] = [str(host_root), str(packages)]
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.manual_seed(15)
    with torch.no_grad():
        parts = _models(host_root / "backend/huggingface/runwayml/stable-diffusion-v1-5")
        state_dict = {
            prefix + key: value.half() if value.is_floating_point() else value
            for prefix, model in parts.items()
            for key, value in model.state_dict().items()
        }
    safetensors.torch.save_file(state_dict, out, metadata={"format": "pt"})


def _models(configs: Path) -> dict[str, nn.Module]:
    """UNet, VAE and CLIP by their checkpoint prefix, with outputs of the size that real ones have."""
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from backend.nn.vae import IntegratedAutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    unet: Any = IntegratedUNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        channel_mult=(1, 1),
        num_res_blocks=(1, 1),
        transformer_depth=[1, 1],
        transformer_depth_output=[1] * 4,
        transformer_depth_middle=1,
        num_heads=8,
        num_head_channels=-1,
        context_dim=768,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        adm_in_channels=None,
    )
    vae: Any = IntegratedAutoencoderKL.from_config(IntegratedAutoencoderKL.load_config(str(configs / "vae")))
    clip: Any = CLIPTextModel(CLIPTextConfig.from_pretrained(str(configs / "text_encoder")))

    for name, parameter in unet.named_parameters():
        if ".attn2." in name and parameter.ndim == 2:
            parameter.mul_(2.5)  # so that the prompt shows in the image
    # Emphasis divides by the mean of the text encoding, which without any bias is about 0, or 0
    clip.text_model.final_layer_norm.bias.fill_(0.1)
    noise, step, text = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 768)
    _scale(unet.out[2], lambda: unet(noise, step, context=text), 0.8)
    _scale(vae.decoder.conv_out, lambda: vae.decode(5.0 * noise), 0.55)
    for parameter in unet.parameters():
        parameter.copy_(parameter.to(torch.float8_e4m3fn))
    return {UNET: unet, VAE: vae, CLIP: clip}


def _scale(last: nn.Conv2d, run: Callable[[], Tensor], deviation: float) -> None:
    """Scale a model's last layer until its output has this standard deviation."""
    assert last.bias is not None
    last.bias.zero_()
    nn.init.normal_(last.weight, std=0.02)
    last.weight.mul_(deviation / run().std())


if __name__ == "__main__":
    _write(Path(sys.argv[1]), Path(sys.argv[2]))
