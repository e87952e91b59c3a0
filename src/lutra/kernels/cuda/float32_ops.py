"""The `torch.library` op of `float32.py`, with its fake implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.kernels.ops import check_activations, library

library.define(
    "cuda_linear_float32(Tensor x, Tensor planes, Tensor scales, Tensor? bias, int out_features, "
    "int in_features, int bits, int group_size, bool uniform) -> Tensor"
)

DTYPES = (torch.float32,)  # of activations


@torch.library.register_fake("lutra::cuda_linear_float32", lib=library)
def _(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int,
    in_features: int, bits: int, group_size: int, uniform: bool,
) -> Tensor:
    check_activations(x, planes, in_features, DTYPES)
    return x.new_empty((*x.shape[:-1], out_features))


def _cuda_linear_float32(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int,
    in_features: int, bits: int, group_size: int, uniform: bool,
) -> Tensor:
    from lutra.kernels.cuda.float32 import multiply
    from lutra.kernels.cuda.layout import layout_of

    check_activations(x, planes, in_features, DTYPES)
    layout = layout_of(out_features, in_features, bits, group_size, uniform)
    y = multiply(x.reshape(-1, in_features), planes, scales, bias, layout, uniform)
    return y.view(*x.shape[:-1], out_features)


library.impl("cuda_linear_float32", _cuda_linear_float32, "CUDA")
