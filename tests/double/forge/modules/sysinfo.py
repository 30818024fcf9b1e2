"""Options that a generation, or a client, brings along."""

from __future__ import annotations

from typing import Any


def set_config(
    req: dict[str, Any], is_api: bool = False, run_callbacks: bool = True, save_config: bool = True
) -> None:
    """Only another checkpoint makes the loading parameters anew, not another storage type."""
    from modules import sd_models, shared
    from modules_forge import main_entry

    checkpoint_changed = False
    for key, value in req.items():
        if value == shared.opts.data.get(key):
            continue
        if key == "sd_model_checkpoint":
            if value is not None and value not in sd_models.checkpoint_aliases:
                raise RuntimeError(f"model {value!r} not found")
            checkpoint_changed = main_entry.checkpoint_change(value, save=False, refresh=False)
        else:
            shared.opts.set(key, value, is_api=is_api, run_callbacks=run_callbacks)
    if checkpoint_changed:
        main_entry.refresh_model_loading_parameters()
    if save_config:
        shared.opts.save(shared.config_filename)
