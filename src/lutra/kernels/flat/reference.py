"""The product of flattened integers in plain torch: exact, on any device, slow."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.formats.flat import FlatWeight, rotate_inputs, words_of
from lutra.kernels.flat import FlatKernel, FlatSpec
from lutra.kernels.flat.lowering import quantize_input


def wide_product(q_MI: Tensor, wide_OI: Tensor) -> Tensor:
    """``q @ W^T`` in exact integers, int64 ``[tokens, out]``: the oracle of every kernel.

    A product of floats is exact, in any order of summation, as long as no partial sum can pass the
    integers that the float type holds: 2^24 for float32, 2^53 for float64. On a GPU it is float64:
    to look at the values would wait for them, and break the capture of a CUDA graph.
    """
    if not q_MI.numel() or not wide_OI.numel():
        return torch.zeros(len(q_MI), len(wide_OI), dtype=torch.int64, device=q_MI.device)
    dtype = torch.float64
    if q_MI.device.type == "cpu":
        largest_I = q_MI.abs().amax(0).double()
        worst = float((wide_OI.abs().double() @ largest_I).amax())
        dtype = torch.float32 if worst < 2**24 else torch.float64
    return (q_MI.to(dtype) @ wide_OI.to(dtype).T).to(torch.int64)


def scale_output(
    acc_MO: Tensor, step_M: Tensor, scale_O: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``float32(acc) * (step * scale) + bias``, rounded once to ``dtype``."""
    y_MO = acc_MO.to(torch.float32) * (step_M[:, None] * scale_O)
    if bias is not None:
        y_MO = y_MO + bias.to(torch.float32)
    return y_MO.to(dtype)


def linear(x: Tensor, weight: FlatWeight, bias: Tensor | None) -> Tensor:
    """The layer as it is defined, ``[..., in]`` to ``[..., out]``."""
    if weight.rotated is not None:
        x = rotate_inputs(x, weight.rotated)
    x_MI = x.reshape(-1, weight.in_features)
    q_MI, step_M = quantize_input(x_MI, weight.limit, weight.step, weight.smooth)
    acc_MO = wide_product(q_MI, weight.wide())
    y_MO = scale_output(acc_MO, step_M, weight.scale, bias, x.dtype)
    return y_MO.reshape(*x.shape[:-1], weight.out_features)


class ReferenceFlatKernel(FlatKernel):
    """Unpacks the weight at every call. Correct everywhere, fast nowhere."""

    name = "flat reference"

    def supports(self, spec: FlatSpec) -> str | None:
        return None

    def prepare(self, weight: FlatWeight, spec: FlatSpec) -> list[Tensor]:
        nothing = weight.scale.new_empty(0)
        step = nothing if weight.step is None else weight.step
        smooth = nothing if weight.smooth is None else weight.smooth
        return [weight.digits, weight.scale, weight.limit, weight.source, step, smooth]

    def restore(self, prepared: list[Tensor], spec: FlatSpec) -> Tensor:
        digits = prepared[0]
        assert digits.shape[2] == words_of(spec.columns, spec.bits)
        return digits

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        digits, scale, limit, source, step, smooth = prepared
        weight = FlatWeight(
            digits, scale, limit, source, spec.bits, spec.in_features,
            step if spec.static else None, smooth if spec.smooth else None,
        )  # fmt: skip
        return linear(x, weight, bias)
