"""LoRA files of a prompt, and what follows them in a model."""
