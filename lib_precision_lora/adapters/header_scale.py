"""A layer's scale as the header has it: used where the tensors have none, else compared with theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lib_precision_lora.adapters.declared import Training

_INNER = ("lora_down", "lora_embedding_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Roles whose first axis is the rank, the one that divides alpha first."""

_WHOLE = ("lokr_w1", "lokr_w2")
_TOLERANCE = 2e-3
"""An alpha that is stored in bf16 is no disagreement."""


def added_by_header(tensors: Mapping[str, Tensor], training: Training) -> dict[str, Tensor]:
    """The tensors that the header stands for, by role.

    `alpha`, with which `alpha / rank` is the header's scale, in fp64; the scale itself of a LoKr of two whole
    factors, whose rank PEFT's configuration has alone. None where the tensors have an alpha: tensors win.
    """
    if "alpha" in tensors or training.alpha is None:
        return {}
    rank = _rank(tensors)
    if rank is not None:
        scale = training.scale(rank)
        return {"alpha": torch.tensor(scale, dtype=torch.float64) * rank}
    if all(role in tensors for role in _WHOLE) and training.rank:
        return {"scale": torch.tensor(training.scale(training.rank), dtype=torch.float64)}
    return {}


def disagreements(tensors: Mapping[str, Tensor], training: Training) -> Iterator[str]:
    """One clause for each thing that tensors and header say differently of a layer, for a sentence."""
    rank = _rank(tensors)
    if rank is None:
        return
    if training.rank not in (None, rank):
        yield f"the header says rank {training.rank}, the tensors have rank {rank}"
    declared = training.scale(rank)
    if "alpha" in tensors and declared is not None:
        scale = float(tensors["alpha"]) / rank
        if not math.isclose(scale, declared, rel_tol=_TOLERANCE):
            yield (
                f"the header says alpha {training.alpha:g}{' with rsLoRA' if training.stabilized else ''} "
                f"(scale {declared:g}), the tensors say alpha {float(tensors['alpha']):g} (scale {scale:g})"
            )
    magnitudes = any(role in tensors for role in ("magnitude", "dora_scale"))
    if training.dora is not None and training.dora != magnitudes:
        has, lacks = ("has", "none") if magnitudes else ("lacks", "one")
        yield f"the file {has} a magnitude of DoRA, the header says that there is {lacks}"


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    """That of the factors; None where there is none, or none that can be told."""
    for role in _INNER:
        whole = role.rpartition("_")[0]
        if role in tensors and whole not in tensors and tensors[role].ndim and tensors[role].shape[0]:
            return tensors[role].shape[0]
    return None
