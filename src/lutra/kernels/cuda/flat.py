"""Flattened layers on NVIDIA GPUs: integers of 8 or 4 bits on tensor cores, any number of tokens.

What multiplies what:

- Hopper (9.0): 8-bit products. 4-bit weights stay 4 bits in memory and become 8 bits in registers;
  Hopper's tensor cores have no 4-bit integers.
- Ampere and Ada (8.0 to 8.9): 8-bit products for 8-bit layers, 4-bit products for 4-bit layers.
- other cards: 8-bit products; 4-bit layers are stored as 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import lutra.kernels.cuda.flat_ops  # noqa: F401  (registers the ops)
from lutra.formats.flat import FlatWeight, rotate_inputs
from lutra.kernels.flat import FlatKernel, FlatSpec
from lutra.kernels.flat.before import Before, Norm

if TYPE_CHECKING:
    from lutra.kernels.cuda.flat_products import Job
    from lutra.kernels.cuda.launch import Card


class CudaFlatKernel(FlatKernel):
    """Flattened integers on GPUs of compute capability 8.0 and up, float16 and bfloat16."""

    name = "cuda-flat"

    def supports(self, spec: FlatSpec) -> str | None:
        from lutra.kernels.cuda import unusable

        if spec.device.type != "cuda":
            return f"the weight is on {spec.device.type}, not on a CUDA device"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"activations are {spec.dtype}; float16 and bfloat16 are supported"
        index = spec.device.index
        if index is None:
            index = torch.cuda.current_device()
        return unusable(index)

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

    def describe(self, spec: FlatSpec, tokens: int) -> tuple[str, str]:
        from lutra.kernels.cuda.flat_products import choose
        from lutra.kernels.cuda.launch import card

        index = spec.device.index
        gpu = card(index if index is not None else torch.cuda.current_device())
        plan, reason = choose(_job(spec, tokens, gpu, 0), gpu)
        return plan.kernel, reason

    def instances(
        self, spec: FlatSpec, tokens: Iterable[int], kinds: Sequence[tuple[int, int]], gpu: Card
    ) -> list[tuple[str, dict[str, int]]]:
        """Kernel files, with their compile-time parameters, that a layer launches on a card.

        Args:
            spec: of the layer; which of its channels are wide is not known here, so programs with
                and without high columns are listed.
            tokens: numbers of tokens.
            kinds: what is computed on the way, of
                :func:`lutra.kernels.cuda.flat_products.kind_of`.
            gpu: the card; it need not be there.
        """
        from lutra.kernels.cuda.flat_products import instances

        found = {}
        for count in tokens:
            for high in (0, 32):
                job = _job(spec, count, gpu, high)
                listed = instances(job, spec.in_features, spec.smooth, spec.dtype, gpu, kinds)
                for name, defines, _ in listed:
                    found[name, *sorted(defines.items())] = name, defines
        return list(found.values())

    def restore(self, prepared: list[Tensor], spec: FlatSpec) -> Tensor:
        from lutra.kernels.cuda.flat_layout import Prepared, restore

        return restore(Prepared(*prepared), spec.out_features, spec.columns, spec.bits)

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        return torch.ops.lutra.cuda_flat_linear(
            x, *prepared, bias, spec.out_features, spec.in_features
        )

    def rotate(self, x: Tensor, rotated: Tensor, spec: FlatSpec) -> Tensor:
        from lutra.kernels.cuda.flat_products import rotates
        from lutra.kernels.cuda.launch import card

        if not rotates(spec.in_features, rotated.shape[1], card(x.device.index)):
            return rotate_inputs(x, rotated)
        return torch.ops.lutra.cuda_flat_rotate(x, rotated)

    def reads(self, before: Before, spec: FlatSpec) -> bool:
        from lutra.kernels.cuda.flat_products import can_come_before

        return can_come_before(spec.in_features)

    def linear_of(
        self, x: Tensor, before: Before, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        from lutra.kernels.cuda.flat_products import kind_of

        second, third, epsilon = None, None, 0.0
        if isinstance(before, Norm):
            second, third, epsilon = before.weight, before.bias, before.epsilon
        else:
            second = before.times
        return torch.ops.lutra.cuda_flat_linear_of(
            x, second, third, *kind_of(before), epsilon, *prepared, bias, spec.out_features,
            spec.in_features,
        )


def _job(spec: FlatSpec, tokens: int, gpu: Card, high: int) -> Job:
    """The product of a layer of which only the shape is known."""
    from lutra.kernels.cuda.flat_layout import COLUMN_TILE, multiplier_of
    from lutra.kernels.cuda.flat_products import Job

    multiplier = multiplier_of(gpu.capability, spec.bits)
    columns = -(-(spec.columns + high) // COLUMN_TILE) * COLUMN_TILE
    return Job(
        spec.out_features, tokens, columns, multiplier.registers, multiplier.digit_bits, high,
        spec.dtype == torch.bfloat16,
    )
