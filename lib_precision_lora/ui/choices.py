"""What can be chosen for one generation, by the names that page, infotext and API use."""

from __future__ import annotations

AS_SET = "as set above"
"""Whatever settings and page say elsewhere."""

COMPUTE_MODES = ("Automatic", "fp16", "fp32")
COMPUTE_CHOICES = (AS_SET, *COMPUTE_MODES)
OURS = "Precision LoRA"
STOCK_MERGE, STOCK_ONLINE = "stock Forge merge", "stock Forge (fp16 LoRA)"
PATCHERS = (OURS, STOCK_MERGE, STOCK_ONLINE)
FP16_LORA = "Precision LoRA keeps LoRAs exact in every mode: (fp16 LoRA) changes nothing"
"""What is said, in the log and below an image, of the host's low-bits names that end so."""
