"""Reports for people: what a LoRA file holds, and how faithfully a LoRA is applied."""
