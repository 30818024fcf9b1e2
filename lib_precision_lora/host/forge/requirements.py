"""What the binding relies on in Forge; `installation.py` checks it before anything is touched."""

from __future__ import annotations

from lib_precision_lora.host.common_requirements import COMMON_REQUIREMENTS
from lib_precision_lora.host.contract import Requirement

REQUIREMENTS = (
    Requirement(
        "backend.patcher.lora",
        "LoraLoader.refresh",
        ("self", "lora_patches", "offload_device", "force_refresh"),
    ),
    Requirement("backend.patcher.lora", "load_lora", ("lora", "to_load"), called=True),
    Requirement(
        "backend.patcher.base",
        "ModelPatcher.add_patches",
        ("self", "filename", "patches", "strength_patch", "strength_model", "online_mode"),
    ),
    Requirement("backend.patcher.base", "ModelPatcher.clone", ("self",), called=True),
    Requirement("backend.patcher.base", "ModelPatcher.refresh_loras", ("self",), called=True),
    Requirement("backend.patcher.base", "ModelPatcher.has_online_lora", ("self",)),
    Requirement(
        "backend.memory_management",
        "load_models_gpu",
        ("models", "memory_required", "hard_memory_preservation"),
    ),
    Requirement(
        "backend.memory_management",
        "LoadedModel.model_load",
        ("self", "model_gpu_memory_when_using_cpu_swap"),
    ),
    Requirement("backend.memory_management", "LoadedModel.model_unload", ("self", "avoid_model_moving")),
    Requirement("backend.memory_management", "unload_model_clones", ("model",), called=True),
    Requirement("backend.memory_management", "module_size", ("module", "include_device")),
    Requirement("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers", "dyn_dims")),
    Requirement(
        "modules.processing",
        "StableDiffusionProcessing.cached_params",
        ("self", "required_prompts", "steps", "extra_network_data", "hires_steps", "use_old_scheduling"),
    ),
    *COMMON_REQUIREMENTS,
)
