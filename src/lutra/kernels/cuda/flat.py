"""Flattened layers on NVIDIA GPUs: integers of 8 or 4 bits on tensor cores, any number of tokens.

What multiplies what:

- Hopper (9.0): 8-bit products. 4-bit weights stay 4 bits in memory and become 8 bits in registers;
  Hopper's tensor cores have no 4-bit integers.
- Ampere and Ada (8.0 to 8.9): 8-bit products for 8-bit layers, 4-bit products for 4-bit layers.
- other cards: 8-bit products; 4-bit layers are stored as 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lutra.kernels.cuda.flat_ops  # noqa: F401  (registers the ops)
from lutra.formats.flat import FlatWeight
from lutra.kernels.flat import FlatKernel, FlatSpec


class CudaFlatKernel(FlatKernel):
    """Flattened integers on GPUs of compute capability 8.0 and up, float16 and bfloat16."""

    name = "cuda-flat"

    def supports(self, spec: FlatSpec) -> str | None:
        from lutra.kernels.cuda import unusable
        from lutra.kernels.cuda.flat_products import max_inputs
        from lutra.kernels.cuda.launch import card

        if spec.device.type != "cuda":
            return f"the weight is on {spec.device.type}, not on a CUDA device"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"activations are {spec.dtype}; float16 and bfloat16 are supported"
        index = spec.device.index
        if index is None:
            index = torch.cuda.current_device()
        refusal = unusable(index)
        if refusal is None and spec.in_features > max_inputs(card(index)):
            most = max_inputs(card(index))
            refusal = f"{spec.in_features} inputs; a block quantizes a token of at most {most}"
        return refusal

    def prepare(self, weight: FlatWeight, spec: FlatSpec) -> list[Tensor]:
        from lutra.kernels.cuda import flat_products
        from lutra.kernels.cuda.flat_layout import multiplier_of, prepare
        from lutra.kernels.cuda.launch import card

        prepared = prepare(weight, multiplier_of(card(weight.digits.device.index).capability,
                                                 weight.bits))
        flat_products.load_all(prepared, spec.out_features, spec.in_features, spec.dtype)
        # Kernels fetch weights before they wait for the kernel ahead of them (see launch.py), so
        # nothing that writes a weight may still be under way when the first of them is queued.
        torch.cuda.synchronize(prepared.weight.device)
        return prepared.tensors()

    def restore(self, prepared: list[Tensor], spec: FlatSpec) -> Tensor:
        from lutra.kernels.cuda.flat_layout import Prepared, restore

        return restore(Prepared(*prepared), spec.out_features, spec.columns, spec.bits)

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        return torch.ops.lutra.cuda_flat_linear(
            x, *prepared, bias, spec.out_features, spec.in_features
        )

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor, epsilon: float, prepared: list[Tensor],
        bias: Tensor | None, spec: FlatSpec,
    ) -> Tensor:
        """:meth:`linear` of the RMS norm of ``x``, which goes to memory as integers only."""
        return torch.ops.lutra.cuda_flat_norm_linear(
            x, norm_weight, epsilon, *prepared, bias, spec.out_features, spec.in_features
        )

    def gated_linear(
        self, gate: Tensor, up: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        """:meth:`linear` of ``silu(gate) * up``, which goes to memory as integers only."""
        return torch.ops.lutra.cuda_flat_gated_linear(
            gate, up, *prepared, bias, spec.out_features, spec.in_features
        )
