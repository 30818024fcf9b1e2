"""What every host must have; each one's own is in its folder."""

from __future__ import annotations

from lib_precision_lora.host.contract import Requirement
from lib_precision_lora.host.generation.generation_overrides import OVERRIDE_REQUIREMENTS

COMMON_REQUIREMENTS = (
    Requirement("backend.patcher.lora", "model_lora_keys_unet", ("model", "key_map"), called=True),
    Requirement("backend.patcher.lora", "model_lora_keys_clip", ("model", "key_map"), called=True),
    Requirement("backend.memory_management", "current_loaded_models"),
    Requirement("backend.memory_management", "free_memory", ("memory_required", "device", "keep_loaded")),
    Requirement("backend.memory_management", "get_free_memory", ("dev",), called=True),
    Requirement("backend.memory_management", "get_total_memory", ("dev",), called=True),
    Requirement("backend.memory_management", "get_torch_device"),
    Requirement("backend.memory_management", "minimum_inference_memory"),
    Requirement("backend.memory_management", "is_device_cpu", ("device",), called=True),
    Requirement("backend.memory_management", "soft_empty_cache"),
    Requirement("modules.sd_samplers_kdiffusion", "sampling_prepare", ("unet", "x")),
    Requirement("modules.sd_samplers_timesteps", "sampling_prepare", ("unet", "x")),
    Requirement("backend.utils", "get_state_dict_after_quant", ("model", "prefix")),
    Requirement("backend.diffusion_engine.base", "ForgeDiffusionEngine.save_unet", ("self", "filename")),
    Requirement(
        "backend.diffusion_engine.base", "ForgeDiffusionEngine.save_checkpoint", ("self", "filename")
    ),
    Requirement("extra_networks_lora", "ExtraNetworkLora.activate", ("self", "p", "params_list"), own=True),
    Requirement("networks", "load_network", ("name", "network_on_disk"), called=True),
    Requirement("network", "NetworkOnDisk.set_hash", ("self", "v"), called=True),
    Requirement("networks", "update_available_networks_by_names", ("names",), called=True),
    Requirement("networks", "list_available_networks"),
    Requirement("networks", "available_networks"),
    Requirement("networks", "available_network_aliases"),
    Requirement("networks", "forbidden_network_aliases"),
    Requirement("networks", "loaded_networks"),
    Requirement("modules.sd_models", "model_data.get_sd_model"),
    Requirement("modules.shared", "opts"),
    Requirement("modules.shared", "state"),
    *OVERRIDE_REQUIREMENTS,
)
