"""Measures one stored weight: the LoRA beside it, and merged into it the stock-like way.

error = ‖(W_eff − W0) − Δ‖ / ‖Δ‖ over all layers together, Δ = alpha / rank · up · down in float64
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from lib_precision_lora.adapters import LoRA, adapter_bytes, read_adapters
from lib_precision_lora.branch import Compute, PatchSession
from lib_precision_lora.memory.meter import ByteMeter
from lib_precision_lora.report.demo.files import FORMATS, read_tensors
from lib_precision_lora.report.demo.model import Linear, Transformer, build_model
from lib_precision_lora.report.demo.result import Ours, Row, Stock
from lib_precision_lora.report.demo.stock_merge import (
    STOCK_FORMATS,
    NoRequantizerError,
    StockFormat,
    stock_like_merge,
)
from lib_precision_lora.report.demo.weights import kohya_name

FORWARDS = 4
"""Times are the fastest of so many runs, with and without the LoRA in turn."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model read from its file, the LoRA's tensors, and one input: x [tokens, hidden], vec [hidden]."""

    model: Transformer
    lora: Mapping[str, Tensor]
    x: Tensor
    vec: Tensor

    @property
    def key_map(self) -> dict[str, str]:
        """The LoRA's module name → the model's parameter."""
        return {
            kohya_name(name): name for name, _ in self.model.named_parameters() if name.endswith(".weight")
        }

    def linears(self) -> Iterator[tuple[Linear, LoRA]]:
        """Every linear layer with its adapter."""
        for name, adapter in read_adapters(self.lora, self.key_map).items():
            module = self.model.get_submodule(str(name).removesuffix(".weight"))
            assert isinstance(module, Linear)
            assert isinstance(adapter, LoRA)
            yield module, adapter

    def forward(self) -> Tensor:
        y: Tensor = self.model(self.x, self.vec)
        return y

    def attach(self, session: PatchSession, compute: Compute) -> None:
        session.apply([("demo LoRA", read_adapters(self.lora, self.key_map), 1.0)], compute)


def measure(stored: str, checkpoint: Path, lora: Path, tokens: int, compute: Compute) -> Row:
    """Reads both files back from disk and measures both ways."""
    model = build_model(FORMATS[stored].read(checkpoint))
    hidden = model.get_submodule("single_blocks.0.linear1")
    assert isinstance(hidden, Linear)
    generator = torch.Generator().manual_seed(2)
    columns = hidden.stored.shape[1]
    x = torch.randn(tokens, columns, generator=generator)
    vec = torch.randn(columns, generator=generator)
    subject = Subject(model, read_tensors(lora), x, vec)
    with torch.no_grad():
        ours = measure_branch(subject, compute)
        try:
            stock, refused = measure_merge(subject, STOCK_FORMATS[stored]), None
        except NoRequantizerError as error:
            stock, refused = None, str(error)
    return Row(stored, checkpoint.stat().st_size, ours, stock, refused)


def measure_branch(subject: Subject, compute: Compute) -> Ours:
    """The LoRA as a session runs it beside the base, and what the model is after it was taken off."""
    before = fingerprint(subject.model)
    attach: list[float] = []
    plain: list[float] = []
    patched: list[float] = []
    session = PatchSession(subject.model)
    subject.forward()
    for _ in range(FORWARDS):
        plain.append(seconds(subject.forward))
        attach.append(seconds(lambda: subject.attach(session, compute)))
        subject.forward()
        patched.append(seconds(subject.forward))
        session.clear()
    plain_peak = peak_bytes(subject.forward)
    subject.attach(session, compute)
    patched_peak = peak_bytes(subject.forward)
    held = sum(adapter_bytes(adapter) for _, adapter in subject.linears())
    error = relative_error((attached_delta(module), exact_delta(lora)) for module, lora in subject.linears())
    session.clear()
    return Ours(
        error=error,
        attach_seconds=min(attach),
        forward_seconds=min(patched),
        base_forward_seconds=min(plain),
        extra_bytes=held + max(0, patched_peak - plain_peak),
        base_unchanged=fingerprint(subject.model) == before,
    )


def measure_merge(subject: Subject, stored: StockFormat) -> Stock:
    """Every layer merged; the model itself stays as it is. Raises NoRequantizerError."""
    elapsed, peak = 0.0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for module, lora in subject.linears():
        merge = partial(stock_like_merge, stored, module.weight, lora)
        elapsed += seconds(merge)
        peak = max(peak, peak_bytes(merge))
        pairs.append((merge()().double() - module.stored.dense().double(), exact_delta(lora)))
    return Stock(relative_error(pairs), elapsed, peak)


def attached_delta(module: Linear) -> Tensor:
    """ΔW as the attached branch computes it, float64 [out, in]: its output for the unit matrix where the
    base answers 0."""
    rows, columns = module.stored.shape

    def silent(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], rows)

    module.forward = silent  # type: ignore[method-assign]
    try:
        y: Tensor = module(torch.eye(columns))
    finally:
        del module.forward
    return y.T.double()


def exact_delta(lora: LoRA) -> Tensor:
    """Δ = alpha / rank · up · down in float64, [out, in]."""
    return lora.scale * (lora.up.double() @ lora.down.double())


def relative_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """`√Σ‖measured − exact‖² / √Σ‖exact‖²` over pairs (measured, exact)."""
    wrong = total = 0.0
    for measured, exact in pairs:
        wrong += float((measured - exact).square().sum())
        total += float(exact.square().sum())
    return float((wrong / total) ** 0.5)


def delta_ratio(checkpoint: Path, lora: Path) -> float:
    """`‖Δ‖ / ‖W‖` over all layers of a dense checkpoint."""
    model = build_model(FORMATS["bf16"].read(checkpoint))
    subject = Subject(model, read_tensors(lora), torch.empty(0), torch.empty(0))
    return 1 / relative_error(
        (module.stored.dense().double() + exact_delta(lora), exact_delta(lora))
        for module, lora in subject.linears()
    )


def fingerprint(model: nn.Module) -> dict[str, tuple[int, str]]:
    """For each parameter which object it is, and a digest of its bytes."""
    return {name: (id(parameter), digest(parameter.data)) for name, parameter in model.named_parameters()}


def digest(values: Tensor) -> str:
    stored = values.contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(stored.tobytes(), digest_size=16).hexdigest()


def seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of new tensors that lived at once during `run`."""
    meter = ByteMeter()
    with meter:
        run()
    return meter.peak
