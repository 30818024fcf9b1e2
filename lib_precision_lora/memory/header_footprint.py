"""What the branch of one module takes on a device, as far as files' headers tell.

The running host knows more of it: `branch/session/planning/footprint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lib_precision_lora.memory.chunks import FP32, block_bytes


@dataclass(frozen=True, slots=True)
class HeaderFootprint:
    """Bytes that one module's branch takes on a device.

    factors: the sizes of the tensors that are placed there; shared: of these, the bytes that need no
    memory of their own where the file's tensors lie on the same device (a CPU); workspace: what a forward
    takes on top, whatever the count of tokens, once they fill a chunk; token_bytes: before that, for each
    token, next to fixed_bytes; position_bytes: for each position of a convolution, whose parts are not cut.
    """

    factors: tuple[int, ...] = ()
    shared: int = 0
    token_bytes: int = 0
    fixed_bytes: int = 0
    position_bytes: int = 0

    @property
    def factor_bytes(self) -> int:
        return sum(self.factors)

    def workspace_bytes(self, tokens: int) -> int:
        """tokens: rows of the input, or positions of the largest sample."""
        return block_bytes(tokens, self.token_bytes) + tokens * self.position_bytes + self.fixed_bytes

    def with_bias(self, rows: int) -> HeaderFootprint:
        """Beside the change of a bias, fp32."""
        return replace(self, factors=(*self.factors, rows * FP32), shared=self.shared + rows * FP32)
