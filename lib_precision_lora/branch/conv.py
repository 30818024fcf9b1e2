"""The branch of a convolution: `y += up · (scale · conv(x, down)) + conv(x, D) + b`, sample by sample."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lib_precision_lora.branch.operands import Operands, WeightBranch
from lib_precision_lora.branch.product import Product, SingleProduct
from lib_precision_lora.branch.rows import WORKSPACE_BYTES, add_rows

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class ConvBranch(WeightBranch):
    """Runs on the input and the output of a Conv1d, Conv2d or Conv3d.

    Stride, padding, its mode, and dilation are read from the module at each call, since hosts change them
    (seamless tiling makes padding circular).
    """

    def __call__(self, module: Conv, x: Tensor, y: Tensor) -> Tensor:
        """`y + branch(x)`, in y's memory where its layout allows; x: [B, in, …] or [in, …], y alike."""
        operands = self.operands(x)
        spatial = len(module.kernel_size)
        y = y if _positions_are_flat(y, spatial) else y.contiguous()
        if x.ndim == spatial + 1:
            self._add(module, operands, x, y)
        else:
            for index in range(x.shape[0]):
                self._add(module, operands, x[index], y[index])
        return y

    def _add(self, module: Conv, operands: Operands, x: Tensor, y: Tensor) -> None:
        """One sample, in place; x: [in, …], y: [out, …]."""
        positions = y.view(y.shape[0], -1).T
        width, height = x.shape[0] // module.groups, y.shape[0] // module.groups
        for group in range(module.groups):
            x_group = x[group * width : (group + 1) * width]
            hidden = None
            if operands.stack is not None:
                down = operands.stack.down.view(-1, width, *module.kernel_size)
                hidden = convolve(module, operands.product, x_group, down) * operands.scale

            def through_dense(rows: Tensor, x_group: Tensor = x_group) -> Tensor:
                return convolve(module, SingleProduct(), x_group, rows)

            window = (group * height, (group + 1) * height)
            add_rows(operands, hidden, positions, module.bias, through_dense, window)


def convolve(module: Conv, product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """`conv(x, weight)` in fp32, without bias, as the module would; input channels in bounded blocks.

    x: [in, …] of one group; weight: [n, in, *kernel]; returns [positions, n].
    """
    padding: str | tuple[int, ...] = module.padding
    if module.padding_mode != "zeros":
        x = functional.pad(x[None], module._reversed_padding_repeated_twice, mode=module.padding_mode)[0]
        padding = (0,) * len(module.kernel_size)

    def op(x: Tensor, w: Tensor) -> Tensor:
        conv = _CONVOLVE[len(module.kernel_size)]
        return conv(x, w, None, module.stride, padding, module.dilation)

    channels = max(1, WORKSPACE_BYTES // (8 * max(1, x[0].numel())))
    axes = tuple(range(1, x.ndim + 1))
    result: Tensor | None = None
    for start in range(0, x.shape[0], channels):
        part = slice(start, start + channels)
        block = product(op, x[None, part], weight[:, part], axes)
        result = block if result is None else result.add_(block)
    assert result is not None
    return result[0].flatten(1).T


def _positions_are_flat(y: Tensor, spatial: int) -> bool:
    """Whether each sample's positions can be viewed as one axis."""
    sizes, strides = y.shape[-spatial:], y.stride()[-spatial:]
    return all(strides[axis] == strides[axis + 1] * sizes[axis + 1] for axis in range(spatial - 1))
