"""What the demo measured, as plain values; every number comes from a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from lib_precision_lora.branch import Compute

LIMITS: Mapping[Compute, float] = MappingProxyType({"auto": 1e-6, "fp32": 1e-6, "fp16": 1e-3})
"""Law 2: the largest effective-delta error by compute mode; on a CPU Automatic computes in fp32."""


@dataclass(frozen=True, slots=True)
class Ours:
    """The LoRA beside the base.

    error: effective-delta error; attach_seconds: from the file's tensors to attached branches;
    forward_seconds, base_forward_seconds: with and without the LoRA; extra_bytes: the factors, and what the
    forward's peak grew by; base_unchanged: every parameter the same object with the same bytes.
    """

    error: float
    attach_seconds: float
    forward_seconds: float
    base_forward_seconds: float
    extra_bytes: int
    base_unchanged: bool


@dataclass(frozen=True, slots=True)
class Stock:
    """A stock-like merge. transient_bytes: the peak while the layer that needs most is merged."""

    error: float
    merge_seconds: float
    transient_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One stored weight. file_bytes: its checkpoint on disk; refused: why there is no stock figure."""

    stored: str
    file_bytes: int
    ours: Ours
    stock: Stock | None
    refused: str | None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """parameters: weights of all linear layers; delta_ratio: ‖Δ‖ / ‖W‖ as the files hold them."""

    hidden: int
    blocks: int
    tokens: int
    parameters: int
    rank: int
    delta_ratio: float
    compute: Compute
    limit: float
    seconds: float
    rows: Sequence[Row]

    @property
    def findings(self) -> tuple[str, ...]:
        """One sentence for each law that a row breaks."""
        found: list[str] = []
        for row in self.rows:
            if not row.ours.error <= self.limit:
                found.append(
                    f"{row.stored}: the effective-delta error of the branch is {row.ours.error:.1e}, "
                    f"above {self.limit:.0e} (law 2)"
                )
            if not row.ours.base_unchanged:
                found.append(f"{row.stored}: a stored weight changed (law 1)")
        return tuple(found)

    def as_object(self) -> dict[str, Any]:
        """For JSON: the fields, and the findings."""
        return {**asdict(self), "findings": list(self.findings)}
