"""The slow, obvious product: unpack to dense, multiply with torch. Any device, any shape."""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.formats.bitplanes import BitPlanes
from lutra.kernels.dispatch import Kernel, LinearSpec


class ReferenceKernel(Kernel):
    """Unpacks the weight at every call. Correct everywhere, fast nowhere."""

    name = "reference"

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        return [weight.planes, weight.scale, weight.offset]

    def restore(self, prepared: list[Tensor], spec: LinearSpec) -> BitPlanes:
        planes, scale, offset = prepared
        return BitPlanes(planes, scale, offset, spec.in_features, spec.group_size)

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        return torch.ops.lutra.bitplanes_linear(
            x, *prepared, bias, spec.in_features, spec.group_size
        )
