"""What the binding relies on in Forge; `binding.py` checks it before anything is touched."""

from __future__ import annotations

from lib_precision_lora.host.contract import Requirement
from lib_precision_lora.host.generation.generation_overrides import OVERRIDE_REQUIREMENTS

REQUIREMENTS = (
    Requirement(
        "backend.patcher.lora",
        "LoraLoader.refresh",
        ("self", "lora_patches", "offload_device", "force_refresh"),
    ),
    Requirement("backend.patcher.lora", "load_lora", ("lora", "to_load")),
    Requirement("backend.patcher.lora", "model_lora_keys_unet", ("model", "key_map")),
    Requirement("backend.patcher.lora", "model_lora_keys_clip", ("model", "key_map")),
    Requirement(
        "backend.patcher.base",
        "ModelPatcher.add_patches",
        ("self", "filename", "patches", "strength_patch", "strength_model", "online_mode"),
    ),
    Requirement("backend.patcher.base", "ModelPatcher.clone", ("self",)),
    Requirement("backend.patcher.base", "ModelPatcher.refresh_loras", ("self",)),
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
    Requirement("backend.memory_management", "unload_model_clones", ("model",)),
    Requirement("backend.memory_management", "current_loaded_models"),
    Requirement("backend.memory_management", "free_memory", ("memory_required", "device", "keep_loaded")),
    Requirement("backend.memory_management", "get_free_memory", ("dev",)),
    Requirement("backend.memory_management", "get_total_memory", ("dev",)),
    Requirement("backend.memory_management", "get_torch_device"),
    Requirement("backend.memory_management", "minimum_inference_memory"),
    Requirement("backend.memory_management", "is_device_cpu", ("device",)),
    Requirement("backend.memory_management", "module_size", ("module", "include_device")),
    Requirement("backend.memory_management", "soft_empty_cache"),
    Requirement("modules.sd_samplers_kdiffusion", "sampling_prepare", ("unet", "x")),
    Requirement("modules.sd_samplers_timesteps", "sampling_prepare", ("unet", "x")),
    Requirement("backend.utils", "get_state_dict_after_quant", ("model", "prefix")),
    Requirement("backend.diffusion_engine.base", "ForgeDiffusionEngine.save_unet", ("self", "filename")),
    Requirement(
        "backend.diffusion_engine.base", "ForgeDiffusionEngine.save_checkpoint", ("self", "filename")
    ),
    Requirement("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers", "dyn_dims")),
    Requirement("extra_networks_lora", "ExtraNetworkLora.activate", ("self", "p", "params_list"), own=True),
    Requirement("networks", "load_network", ("name", "network_on_disk")),
    Requirement("network", "NetworkOnDisk.set_hash", ("self", "v")),
    Requirement("networks", "update_available_networks_by_names", ("names",)),
    Requirement("networks", "list_available_networks"),
    Requirement("networks", "available_networks"),
    Requirement("networks", "available_network_aliases"),
    Requirement("networks", "forbidden_network_aliases"),
    Requirement("networks", "loaded_networks"),
    Requirement("modules.sd_models", "model_data.get_sd_model"),
    Requirement(
        "modules.processing",
        "StableDiffusionProcessing.cached_params",
        ("self", "required_prompts", "steps", "extra_network_data", "hires_steps", "use_old_scheduling"),
    ),
    Requirement("modules.shared", "opts"),
    Requirement("modules.shared", "state"),
    *OVERRIDE_REQUIREMENTS,
)
