"""The `torch.library` ops of the flat CUDA kernels, with their fake implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.kernels.ops import library

_PREPARED = (
    "Tensor weight, Tensor scale, Tensor entries, Tensor wide, Tensor keep, Tensor step, "
    "Tensor smooth, Tensor form"
)
library.define(
    f"cuda_flat_linear(Tensor x, {_PREPARED}, Tensor? bias, int out_features, int in_features) "
    "-> Tensor"
)
library.define(
    f"cuda_flat_norm_linear(Tensor x, Tensor norm_weight, float epsilon, {_PREPARED}, "
    "Tensor? bias, int out_features, int in_features) -> Tensor"
)
library.define(
    f"cuda_flat_gated_linear(Tensor gate, Tensor up, {_PREPARED}, Tensor? bias, "
    "int out_features, int in_features) -> Tensor"
)
library.define(f"cuda_flat_quantize(Tensor x, {_PREPARED}, int in_features) -> (Tensor, Tensor)")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, inputs: int) -> None:
    from lutra.kernels.cuda.flat_products import BIAS_DTYPES

    torch._check(
        x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"the flat CUDA kernels take float16 and bfloat16 activations, not {x.dtype}",
    )
    torch._check(
        x.shape[-1] == inputs,
        lambda: f"activations have {x.shape[-1]} features, the weight takes {inputs}",
    )
    torch._check(
        x.device == weight.device,
        lambda: f"activations are on {x.device}, the weight on {weight.device}",
    )
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


def _check_norm(x: Tensor, norm_weight: Tensor) -> None:
    torch._check(
        norm_weight.shape == x.shape[-1:] and norm_weight.dtype == x.dtype
        and norm_weight.device == x.device,
        lambda: f"the norm has {tuple(norm_weight.shape)} {norm_weight.dtype} weights on "
        f"{norm_weight.device} for activations {tuple(x.shape)} {x.dtype} on {x.device}",
    )


def _check_gate(gate: Tensor, up: Tensor) -> None:
    torch._check(
        gate.shape == up.shape and gate.dtype == up.dtype and gate.device == up.device,
        lambda: f"the gate is {tuple(gate.shape)} {gate.dtype} on {gate.device}, what it "
        f"multiplies is {tuple(up.shape)} {up.dtype} on {up.device}",
    )


@torch.library.register_fake("lutra::cuda_flat_norm_linear", lib=library)
def _(
    x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, scale: Tensor,
    entries: Tensor, wide: Tensor, keep: Tensor, step: Tensor, smooth: Tensor, form: Tensor,
    bias: Tensor | None, out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    _check(x, weight, bias, out_features, in_features)
    _check_norm(x, norm_weight)
    return x.new_empty((*x.shape[:-1], out_features))


def _norm_linear(
    x: Tensor, norm_weight: Tensor, epsilon: float, weight: Tensor, scale: Tensor,
    entries: Tensor, wide: Tensor, keep: Tensor, step: Tensor, smooth: Tensor, form: Tensor,
    bias: Tensor | None, out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared

    _check(x, weight, bias, out_features, in_features)
    _check_norm(x, norm_weight)
    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    norm = flat_products.Norm(norm_weight, epsilon)
    y = flat_products.linear(x.reshape(-1, in_features), prepared, bias, out_features, norm)
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("lutra::cuda_flat_gated_linear", lib=library)
def _(
    gate: Tensor, up: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor,
    keep: Tensor, step: Tensor, smooth: Tensor, form: Tensor, bias: Tensor | None,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    _check(gate, weight, bias, out_features, in_features)
    _check_gate(gate, up)
    return gate.new_empty((*gate.shape[:-1], out_features))


def _gated_linear(
    gate: Tensor, up: Tensor, weight: Tensor, scale: Tensor, entries: Tensor, wide: Tensor,
    keep: Tensor, step: Tensor, smooth: Tensor, form: Tensor, bias: Tensor | None,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared

    _check(gate, weight, bias, out_features, in_features)
    _check_gate(gate, up)
    prepared = Prepared(weight, scale, entries, wide, keep, step, smooth, form)
    before = flat_products.Gate(up.reshape(-1, in_features))
    y = flat_products.linear(gate.reshape(-1, in_features), prepared, bias, out_features, before)
    return y.view(*gate.shape[:-1], out_features)


library.impl("cuda_flat_linear", _linear, "CUDA")
library.impl("cuda_flat_norm_linear", _norm_linear, "CUDA")
library.impl("cuda_flat_gated_linear", _gated_linear, "CUDA")
library.impl("cuda_flat_quantize", _quantize, "CUDA")
