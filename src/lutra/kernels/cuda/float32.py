"""Products with float32 activations from the packed weight, for models that run in float32.

The kernels of :class:`~lutra.kernels.cuda.CudaKernel` round activations to what tensor cores take.
Here nothing is rounded but sums: levels are made from their signs and multiplied in fp32, by
`float_linear.cu` for some tens of tokens, beyond by torch from dense rows of `float_expand.cu`.
Float32 is for comparisons and small models; 16 bits are several times as fast.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lutra.kernels.cuda.launch import Card, Function, card, function
from lutra.kernels.cuda.layout import TILE_ROWS, Layout
from lutra.kernels.cuda.products import format_defines

MOST_TOKENS = 64  # of `float_linear.cu`, which makes the levels anew for every eight
EXPANDED_BYTES = 64 << 20  # of dense rows at a time


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("planes", "scales", "x", "bias", "y")),
        *((name, ctypes.c_longlong) for name in ("x_stride", "y_stride")),
        *((name, ctypes.c_int) for name in (
            "rows", "in_features", "tokens", "items", "groups", "items_per_group",
        )),
    ]  # fmt: skip


class _ExpandArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("planes", "scales", "dense")),
        *((name, ctypes.c_int) for name in (
            "in_features", "tile_begin", "tile_end", "items", "groups", "items_per_group",
        )),
    ]  # fmt: skip


def load(layout: Layout, uniform: bool, scale: torch.dtype, index: int) -> None:
    """Compile and load all that products of a format can need on a GPU."""
    for tokens in (1, 4, 8):
        _function("float_linear", layout, uniform, scale, card(index), tokens)
    _function("float_expand", layout, uniform, scale, card(index), 0)


@cache
def _function(
    name: str, layout: Layout, uniform: bool, scale: torch.dtype, device: Card, tokens: int
) -> Function:
    return function(name, defines(layout, uniform, scale, tokens), device)


def defines(layout: Layout, uniform: bool, scale: torch.dtype, tokens: int) -> dict[str, int]:
    """Compile-time parameters; ``tokens`` is 0 for `float_expand.cu`."""
    both = format_defines(layout, uniform, scale, torch.float32)
    return both | ({"TOKENS": tokens} if tokens else {})


def multiply(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, layout: Layout, uniform: bool
) -> Tensor:
    """``x @ W.T + bias`` for float32 ``x`` ``[tokens, inputs]``."""
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    count = x.shape[0]
    y = x.new_empty(count, layout.rows)
    if y.numel() == 0:
        return y
    device = card(x.device.index)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    with torch.cuda.device(device.index):
        if count > MOST_TOKENS:
            _by_expanding(x, planes, scales, y, layout, uniform, device)
            return y if bias is None else y.add_(bias)
        tokens = next(n for n in (1, 4, 8) if n >= min(count, 8))
        kernel = _function("float_linear", layout, uniform, scales.dtype, device, tokens)
        arguments = _Arguments(
            planes.data_ptr(), scales.data_ptr(), x.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), x.stride(0), y.stride(0),
            layout.rows, layout.inputs, count, layout.items, layout.groups, layout.items_per_group,
        )  # fmt: skip
        kernel(arguments, (layout.tiles, -(-count // tokens), 1), 256)
    return y


def _by_expanding(
    x: Tensor, planes: Tensor, scales: Tensor, y: Tensor, layout: Layout, uniform: bool,
    device: Card,
) -> None:  # fmt: skip
    kernel = _function("float_expand", layout, uniform, scales.dtype, device, 0)
    tiles = max(1, min(layout.tiles, EXPANDED_BYTES // (TILE_ROWS * layout.inputs * 4)))
    dense = x.new_empty(tiles * TILE_ROWS, layout.inputs)
    for begin in range(0, layout.tiles, tiles):
        end = min(begin + tiles, layout.tiles)
        arguments = _ExpandArguments(
            planes.data_ptr(), scales.data_ptr(), dense.data_ptr(), layout.inputs, begin, end,
            layout.items, layout.groups, layout.items_per_group,
        )  # fmt: skip
        warps = (end - begin) * layout.items * 2
        kernel(arguments, (-(-warps // 8), 1, 1), 256)
        first, last = begin * TILE_ROWS, min(end * TILE_ROWS, layout.rows)
        torch.mm(x, dense[: last - first].T, out=y[:, first:last])
