"""What the binding relies on in Forge Neo; `installation.py` checks it before anything is touched.

Neo has exchanged its patcher three times in a year. What is asked for is what is called, and
`partially_unload`: by it a model that is loaded gives way.
"""

from __future__ import annotations

from lib_precision_lora.host.common_requirements import COMMON_REQUIREMENTS
from lib_precision_lora.host.contract import Requirement

REQUIREMENTS = (
    Requirement(
        "backend.memory_management",
        "load_models_gpu",
        ("models", "memory_required", "force_patch_weights", "minimum_memory_required"),
    ),
    Requirement("backend.memory_management", "LoadedModel.model_load", ("self", "lowvram_model_memory")),
    Requirement("backend.memory_management", "LoadedModel.model_memory", ("self",), called=True),
    Requirement("backend.memory_management", "LoadedModel.model_unload", ("self", "memory_to_free")),
    Requirement("backend.memory_management", "extra_reserved_memory"),
    Requirement("backend.memory_management", "module_size", ("module",), called=True),
    Requirement("backend.patcher.base", "ModelPatcher.partially_unload"),
    Requirement("modules.sd_samplers_common", "sampling_prepare", ("unet", "x")),
    Requirement("networks", "load_networks", ("names", "te_multipliers", "unet_multipliers")),
    Requirement(
        "modules.processing",
        "StableDiffusionProcessing.cached_params",
        ("self", "required_prompts", "steps", "extra_network_data", "hires_steps"),
    ),
    *COMMON_REQUIREMENTS,
)
