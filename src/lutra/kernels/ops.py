"""The `torch.library` ops: schemas, fake implementations and argument checks.

`lutra::bitplanes_linear` works on the canonical tensors of :class:`BitPlanes` on any device through
the reference. Device kernels register ops of their own on their own layouts (see
:mod:`lutra.kernels.cpu` and :mod:`lutra.kernels.cuda`); the dispatcher picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.formats.bitplanes import BitPlanes

library = torch.library.Library("lutra", "DEF")

library.define(
    "bitplanes_linear(Tensor x, Tensor planes, Tensor scale, Tensor offset, Tensor? bias, "
    "int in_features, int group_size) -> Tensor"
)


def _check(x: Tensor, planes: Tensor, in_features: int) -> None:
    torch._check(
        x.is_floating_point(), lambda: f"activations must be floating point, not {x.dtype}"
    )
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"activations have {x.shape[-1]} features, the weight takes {in_features}",
    )
    torch._check(
        x.device == planes.device,
        lambda: f"activations are on {x.device}, the weight on {planes.device}",
    )


@torch.library.register_fake("lutra::bitplanes_linear", lib=library)
def _(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    _check(x, planes, in_features)
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


def _bitplanes_linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    in_features: int,
    group_size: int,
) -> Tensor:
    _check(x, planes, in_features)
    weight = BitPlanes(planes, scale, offset, in_features, group_size).unpack(torch.float32)
    bias = bias if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


library.impl("bitplanes_linear", _bitplanes_linear, "CompositeExplicitAutograd")
