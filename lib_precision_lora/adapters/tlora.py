"""T-LoRA, which no file of it holds whole: `ΔW = P · diag(λ) · Q − P₀ · diag(λ₀) · Q₀`.

P₀, λ₀ and Q₀ are singular vectors and values of the base that it was trained on (the largest, the smallest
or those between), or of a random matrix. The file has P, λ and Q alone. Source: arXiv 2507.05964; LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lib_precision_lora.adapters.adapter import AdapterError


def refuse_tlora(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` for a layer of a T-LoRA."""
    if "lambda_layer" in tensors:
        raise AdapterError(
            f"{name}: T-LoRA is not supported, its file lacks the singular vectors of the base from which it "
            "is the difference; merge it in its trainer and extract a LoRA from the result"
        )
