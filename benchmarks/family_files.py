"""One file of every family for a linear layer, and what its branch costs by formula.

The letters of the formulas, which are sums of products:

    t  tokens                       i, o  inputs and outputs of the layer
    r  rank, or the size of OFT's blocks
    R  the smallest rank at which a LoHa is made in row blocks, R²·(i + o) ≥ i·o
    a  rows and columns of LoKr's left factor; its right one is p×q
    m  BOFT's stages on outputs     n  on inputs, of which s = n − 1 lie between orders
    c  chunks in which the tokens run

FLOPs are those of the products of one forward, two for a multiplication with its addition, beside the layer's
own 2·t·o·i. Bytes are what stays in memory while the file, in fp16, is attached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_precision_lora.memory.chunks import FP32, token_count

KRONECKER = 16
"""LoKr's a."""

Parts = dict[str, "tuple[int, ...] | float"]
"""Tensors of a layer by key ending: a shape (random values), or a number."""


@dataclass(frozen=True)
class Sizes:
    """The layer and the file; i and o are multiples of `KRONECKER` and of r."""

    tokens: int = 512
    inputs: int = 3072
    outputs: int = 3072
    rank: int = 16

    def __post_init__(self) -> None:
        i, o, r = self.inputs, self.outputs, self.rank
        if min(self.tokens, i, o, r) < 1 or i % KRONECKER or o % KRONECKER or r % 2 or o % r or i % r:
            raise ValueError(
                f"{self.tokens} tokens, {i} inputs, {o} outputs and rank {r}: all are positive, inputs and "
                f"outputs are multiples of {KRONECKER}, and the rank is even and divides both"
            )
        if r * r * (i + o) >= i * o:
            raise ValueError(f"rank {r} is too large for {o}×{i}: a LoHa of it would be made in row blocks")

    @property
    def letters(self) -> dict[str, int]:
        """What the formulas call the sizes."""
        i, o, r = self.inputs, self.outputs, self.rank
        stages, input_stages = (((side // r) & -(side // r)).bit_length() for side in (o, i))
        return {
            "t": self.tokens,
            "i": i,
            "o": o,
            "r": r,
            "R": math.isqrt((i * o - 1) // (i + o)) + 1,
            "a": KRONECKER,
            "p": o // KRONECKER,
            "q": i // KRONECKER,
            "m": stages,
            "n": input_stages,
            "s": input_stages - 1,
            # `branch.arithmetic.chunks` of a Hadamard term
            "c": -(-self.tokens // token_count(FP32 * (i + 2 * o))),
        }

    def value(self, formula: str) -> int:
        """A sum of products such as `2·t·r·i + 2·t·r·o`."""
        letters = self.letters
        return sum(
            math.prod(letters[factor] if factor in letters else int(factor) for factor in product.split("·"))
            for product in formula.split(" + ")
        )


@dataclass(frozen=True)
class FamilyFile:
    """parts: of the file, for the letters; flops, bytes: formulas."""

    parts: Callable[[Mapping[str, int]], Parts]
    flops: str
    bytes: str

    def tensors(self, sizes: Sizes) -> dict[str, Tensor]:
        """The file's tensors, those of a layer named "layer"."""
        g = torch.Generator().manual_seed(0)
        return {
            f"layer.{key}": torch.tensor(part)
            if isinstance(part, float)
            else (0.05 * torch.randn(part, generator=g)).half()
            for key, part in self.parts(sizes.letters).items()
        }


def lora(n: Mapping[str, int]) -> Parts:
    return {"lora_up.weight": (n["o"], n["r"]), "lora_down.weight": (n["r"], n["i"]), "alpha": 1.0}


def loha(letter: str) -> Callable[[Mapping[str, int]], Parts]:
    def parts(n: Mapping[str, int]) -> Parts:
        out, into = (n["o"], n[letter]), (n[letter], n["i"])
        return {"hada_w1_a": out, "hada_w1_b": into, "hada_w2_a": out, "hada_w2_b": into, "alpha": 1.0}

    return parts


def loha_tucker(n: Mapping[str, int]) -> Parts:
    core, out, into = (n["r"], n["r"], 1), (n["r"], n["o"]), (n["r"], n["i"])
    numbered = [{f"hada_t{k}": core, f"hada_w{k}_a": out, f"hada_w{k}_b": into} for k in (1, 2)]
    return {**numbered[0], **numbered[1]}


def lokr_full(n: Mapping[str, int]) -> Parts:
    return {"lokr_w1": (n["a"], n["a"]), "lokr_w2": (n["p"], n["q"])}


def lokr_right(n: Mapping[str, int]) -> Parts:
    return {"lokr_w1": (n["a"], n["a"]), "lokr_w2_a": (n["p"], n["r"]), "lokr_w2_b": (n["r"], n["q"])}


def lokr_both(n: Mapping[str, int]) -> Parts:
    left: Parts = {"lokr_w1_a": (n["a"], n["r"]), "lokr_w1_b": (n["r"], n["a"])}
    return left | {"lokr_w2_a": (n["p"], n["r"]), "lokr_w2_b": (n["r"], n["q"])}


def lokr_tucker(n: Mapping[str, int]) -> Parts:
    left: Parts = {"lokr_w1": (n["a"], n["a"]), "lokr_t2": (n["r"], n["r"], 1)}
    return left | {"lokr_w2_a": (n["r"], n["p"]), "lokr_w2_b": (n["r"], n["q"])}


def dora(inner: Callable[[Mapping[str, int]], Parts], axis: str) -> Callable[[Mapping[str, int]], Parts]:
    def parts(n: Mapping[str, int]) -> Parts:
        return inner(n) | {"dora_scale": (n["o"], 1) if axis == "out" else (1, n["i"])}

    return parts


def glora(n: Mapping[str, int]) -> Parts:
    left: Parts = {"a1.weight": (n["i"], n["r"]), "a2.weight": (n["r"], n["i"])}
    return left | {"b1.weight": (n["o"], n["r"]), "b2.weight": (n["r"], n["i"])}


def glora_old(n: Mapping[str, int]) -> Parts:
    left: Parts = {"a1.weight": (n["r"], n["i"]), "a2.weight": (n["i"], n["r"])}
    return left | {"b1.weight": (n["r"], n["i"]), "b2.weight": (n["o"], n["r"])}


def ia3(on_input: bool) -> Callable[[Mapping[str, int]], Parts]:
    return lambda n: {"weight": (n["i"] if on_input else n["o"],), "on_input": float(on_input)}


def ia3_peft(on_input: bool) -> Callable[[Mapping[str, int]], Parts]:
    return lambda n: {"ia3_l": (1, n["i"]) if on_input else (n["o"], 1)}


def oft(alpha: float, rescaled: bool) -> Callable[[Mapping[str, int]], Parts]:
    def parts(n: Mapping[str, int]) -> Parts:
        blocks: Parts = {"oft_blocks": (n["o"] // n["r"], n["r"], n["r"]), "alpha": alpha}
        return blocks | ({"rescale": (n["o"], 1)} if rescaled else {})

    return parts


def boft(rescaled: bool) -> Callable[[Mapping[str, int]], Parts]:
    def parts(n: Mapping[str, int]) -> Parts:
        blocks: Parts = {"oft_blocks": (n["m"], n["o"] // n["r"], n["r"], n["r"]), "alpha": 0.0}
        return blocks | ({"rescale": (n["o"], 1)} if rescaled else {})

    return parts


def glora_tucker(n: Mapping[str, int]) -> Parts:
    return glora(n) | {"bm.weight": (n["r"], n["r"], 1)}


def oft_peft(shared: bool) -> Callable[[Mapping[str, int]], Parts]:
    return lambda n: {"oft_R.weight": (1 if shared else n["i"] // n["r"], n["r"] * (n["r"] - 1) // 2)}


def boft_peft(n: Mapping[str, int]) -> Parts:
    return {"boft_R": (n["n"], n["i"] // n["r"], n["r"], n["r"]), "boft_s": (n["o"], 1)}


def diff(n: Mapping[str, int]) -> Parts:
    return {"diff": (n["o"], n["i"])}


LORA, LORA_BYTES = "2·t·r·i + 2·t·r·o", "2·r·i + 2·r·o + 8·r"
LOHA, LOHA_BYTES = "2·t·r·r·i + 2·t·r·r·o", "4·r·r·i + 4·r·r·o + 8·r·r"
LOKR, LOKR_BYTES = "2·t·a·q·r + 2·t·a·r·p + 2·t·a·a·p", "2·a·a + 2·r·p + 2·r·q"
GLORA, GLORA_BYTES = "4·t·r·i + 4·t·r·o", "18·r·i + 14·r·o + 16·r"
OFT, OFT_BYTES = "2·t·o·r", "4·o·r"
BOFT, BOFT_BYTES = "2·m·t·o·r", "4·m·o·r + 16·m·o"
PASS = "2·t·o·i"
"""One more pass through the layer, or a product with a whole matrix."""

FILES: Mapping[str, FamilyFile] = {
    "lora": FamilyFile(lora, LORA, LORA_BYTES),
    "loha": FamilyFile(loha("r"), LOHA, LOHA_BYTES),
    "loha-streamed": FamilyFile(loha("R"), f"{PASS} + 4·c·R·o·i", "4·R·i + 4·R·o"),
    "loha-tucker": FamilyFile(loha_tucker, LOHA, LOHA_BYTES),
    "lokr-full": FamilyFile(lokr_full, "2·t·a·p·q + 2·t·a·a·p", "2·a·a + 2·p·q"),
    "lokr-right": FamilyFile(lokr_right, LOKR, LOKR_BYTES),
    "lokr-both": FamilyFile(lokr_both, LOKR, "4·a·a + 2·r·p + 2·r·q"),
    "lokr-tucker": FamilyFile(lokr_tucker, LOKR, "2·a·a + 4·r·p + 4·r·q"),
    "dora-out": FamilyFile(dora(lora, "out"), LORA, f"{LORA_BYTES} + 4·r·o + 28·o"),
    "dora-in": FamilyFile(dora(lora, "in"), LORA, f"{LORA_BYTES} + 4·r·i + 28·i"),
    "loha-dora-out": FamilyFile(dora(loha("r"), "out"), LOHA, f"{LOHA_BYTES} + 4·r·r·o + 28·o"),
    "loha-dora-in": FamilyFile(dora(loha("r"), "in"), LOHA, f"{LOHA_BYTES} + 4·r·r·i + 28·i"),
    "lokr-dora-out": FamilyFile(dora(lokr_right, "out"), LOKR, f"{LOKR_BYTES} + 8·o"),
    "lokr-dora-in": FamilyFile(dora(lokr_right, "in"), LOKR, f"{LOKR_BYTES} + 8·i"),
    "glora": FamilyFile(glora, GLORA, GLORA_BYTES),
    "glora-old": FamilyFile(glora_old, GLORA, GLORA_BYTES),
    "ia3-out": FamilyFile(ia3(False), "0", "4·o"),
    "ia3-in": FamilyFile(ia3(True), "0", "4·i"),
    "ia3-peft-out": FamilyFile(ia3_peft(False), "0", "4·o"),
    "ia3-peft-in": FamilyFile(ia3_peft(True), "0", "4·i"),
    "oft": FamilyFile(oft(0.0, False), OFT, OFT_BYTES),
    "oft-constraint": FamilyFile(oft(1e-4, False), OFT, OFT_BYTES),
    "oft-rescale": FamilyFile(oft(0.0, True), OFT, f"{OFT_BYTES} + 4·o"),
    "boft": FamilyFile(boft(False), BOFT, BOFT_BYTES),
    "boft-rescale": FamilyFile(boft(True), BOFT, f"{BOFT_BYTES} + 4·o"),
    "diff": FamilyFile(diff, PASS, "2·o·i"),
    "oft-peft": FamilyFile(oft_peft(False), "2·t·i·r", "4·i·r"),
    "oft-peft-shared": FamilyFile(oft_peft(True), "2·t·i·r", "4·r·r"),
    "boft-peft": FamilyFile(boft_peft, f"{PASS} + 2·n·t·i·r", "4·n·i·r + 16·s·i + 12·o"),
    "glora-tucker": FamilyFile(glora_tucker, GLORA, "20·r·i + 14·r·o + 16·r"),
}
"""The names are those of `FAMILIES` in tests/families.py."""
