"""The `torch.library` ops of the flat CUDA kernels, with their fake implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.kernels.cuda.ops import DTYPES
from lutra.kernels.flat.before import ACTIVATIONS, Activation, Before, Norm
from lutra.kernels.ops import check_activations, library

_PREPARED = (
    "Tensor weight, Tensor scale, Tensor entries, Tensor wide, Tensor keep, Tensor step, "
    "Tensor smooth, Tensor form"
)
library.define(
    f"cuda_flat_linear(Tensor x, {_PREPARED}, Tensor? bias, int out_features, int in_features) "
    "-> Tensor"
)
library.define(
    "cuda_flat_linear_of(Tensor x, Tensor? second, Tensor? third, int input, int act, "
    f"float epsilon, {_PREPARED}, Tensor? bias, int out_features, int in_features) -> Tensor"
)
library.define("cuda_flat_rotate(Tensor x, Tensor rotated) -> Tensor")
library.define(f"cuda_flat_quantize(Tensor x, {_PREPARED}, int in_features) -> (Tensor, Tensor)")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, inputs: int) -> None:
    from lutra.kernels.cuda.flat_products import BIAS_DTYPES

    check_activations(x, weight, inputs, DTYPES)
    if bias is not None:
        torch._check(
            bias.shape == (rows,) and bias.dtype in BIAS_DTYPES and bias.device == x.device,
            lambda: f"the bias is {tuple(bias.shape)} {bias.dtype} on {bias.device}; it must be "
            f"({rows},) in float16, bfloat16 or float32 on {x.device}",
        )


@torch.library.register_fake("lutra::cuda_flat_linear", lib=library)
def _(
    x: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor,
    step: Tensor, smooth: Tensor, form: Tensor, bias: Tensor | None, out_features: int,
    in_features: int,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, out_features, in_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _linear(
    x: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor,
    step: Tensor, smooth: Tensor, form: Tensor, bias: Tensor | None, out_features: int,
    in_features: int,
) -> Tensor:  # fmt: skip
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared

    _check(x, weight, bias, out_features, in_features)
    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    y = flat_products.linear(x.reshape(-1, in_features), prepared, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("lutra::cuda_flat_quantize", lib=library)
def _(
    x: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor,
    step: Tensor, smooth: Tensor, form: Tensor, in_features: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from lutra.kernels.cuda.flat_layout import Prepared
    from lutra.kernels.cuda.flat_products import STEP_PADDING

    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    tokens = x.numel() // in_features
    q = x.new_empty((tokens, prepared.columns * prepared.digit_bits // 8), dtype=torch.int8)
    steps = (tokens + STEP_PADDING - 1) // STEP_PADDING * STEP_PADDING
    return q, x.new_empty(steps, dtype=torch.float32)


def _quantize(
    x: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor,
    step: Tensor, smooth: Tensor, form: Tensor, in_features: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared

    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    return flat_products.quantize(x.reshape(-1, in_features), prepared)


def _check_before(x: Tensor, second: Tensor | None, third: Tensor | None, input: int) -> None:
    shape = x.shape if input == 4 else x.shape[-1:]
    needed = {1: (second,), 2: (second, third), 3: (), 4: (second,)}[input]
    for other in needed:
        given = None if other is None else (tuple(other.shape), other.dtype, other.device)
        wanted = (tuple(shape), x.dtype, x.device)
        torch._check(
            given == wanted,
            lambda needs=wanted, has=given: f"what is computed before needs {needs}, not {has}",
        )


def _before(
    second: Tensor | None, third: Tensor | None, input: int, act: int, epsilon: float,
    in_features: int,
) -> Before:  # fmt: skip
    """The inverse of what the kernel makes of it; arguments of an op are tensors and numbers."""
    if input <= 2:
        assert second is not None
        return Norm(second, epsilon, third if input == 2 else None)
    times = None if second is None else second.reshape(-1, in_features)
    return Activation(ACTIVATIONS[act], times)


@torch.library.register_fake("lutra::cuda_flat_linear_of", lib=library)
def _(
    x: Tensor, second: Tensor | None, third: Tensor | None, input: int, act: int, epsilon: float,
    weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor, step: Tensor,
    smooth: Tensor, form: Tensor, bias: Tensor | None, out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, out_features, in_features)
    _check_before(x, second, third, input)
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_of(
    x: Tensor, second: Tensor | None, third: Tensor | None, input: int, act: int, epsilon: float,
    weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor, keep: Tensor, step: Tensor,
    smooth: Tensor, form: Tensor, bias: Tensor | None, out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared

    _check(x, weight, bias, out_features, in_features)
    _check_before(x, second, third, input)
    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    before = _before(second, third, input, act, epsilon, in_features)
    y = flat_products.linear(x.reshape(-1, in_features), prepared, bias, out_features, before)
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("lutra::cuda_flat_rotate", lib=library)
def _(x: Tensor, rotated: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _rotate(x: Tensor, rotated: Tensor) -> Tensor:
    from lutra.kernels.cuda import flat_products

    torch._check(
        rotated.dtype == torch.int32 and rotated.dim() == 2 and rotated.device == x.device,
        lambda: f"rotated inputs are int32 [blocks, block] on {x.device}, not {rotated.dtype} "
        f"{tuple(rotated.shape)} on {rotated.device}",
    )
    rows = x.reshape(-1, x.shape[-1])
    return flat_products.rotate(rows, rotated.contiguous()).view(x.shape)


library.impl("cuda_flat_rotate", _rotate, "CUDA")
library.impl("cuda_flat_linear", _linear, "CUDA")
library.impl("cuda_flat_linear_of", _linear_of, "CUDA")
library.impl("cuda_flat_quantize", _quantize, "CUDA")
