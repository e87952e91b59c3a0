"""The `torch.library` ops of the CUDA kernels, with their fake implementations.

`cuda_linear` takes 16-bit activations (`products.py`), `cuda_linear_float32` those of 32 bits
(`float32.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module

import torch
from torch import Tensor

from lutra.kernels.ops import check_activations, library

DTYPES = (torch.float16, torch.bfloat16)  # of activations


def _register(name: str, dtypes: Collection[torch.dtype], products: str) -> None:
    """Register an op for activations of ``dtypes`` that module ``products`` multiplies."""

    def fake(
        x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int,
        in_features: int, bits: int, group_size: int, uniform: bool,
    ) -> Tensor:  # fmt: skip
        check_activations(x, planes, in_features, dtypes)
        return x.new_empty((*x.shape[:-1], out_features))

    def on_cuda(
        x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int,
        in_features: int, bits: int, group_size: int, uniform: bool,
    ) -> Tensor:  # fmt: skip
        from lutra.kernels.cuda.layout import layout_of

        check_activations(x, planes, in_features, dtypes)
        layout = layout_of(out_features, in_features, bits, group_size, uniform)
        multiply = import_module(products).multiply
        y: Tensor = multiply(x.reshape(-1, in_features), planes, scales, bias, layout, uniform)
        return y.view(*x.shape[:-1], out_features)

    library.define(
        f"{name}(Tensor x, Tensor planes, Tensor scales, Tensor? bias, int out_features, "
        "int in_features, int bits, int group_size, bool uniform) -> Tensor"
    )
    torch.library.register_fake(f"lutra::{name}", fake, lib=library)
    library.impl(name, on_cuda, "CUDA")


_register("cuda_linear", DTYPES, "lutra.kernels.cuda.products")
_register("cuda_linear_float32", (torch.float32,), "lutra.kernels.cuda.float32")
