"""The `torch.library` ops: schemas, fake implementations and argument checks.

`lutra::bitplanes_linear` works on the canonical tensors of :class:`BitPlanes` on any device through
the reference. Device kernels register ops of their own on their own layouts (see
:mod:`lutra.kernels.cpu` and :mod:`lutra.kernels.cuda`); the dispatcher picks.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lutra.formats.bitplanes import BitPlanes

library = torch.library.Library("lutra", "DEF")

library.define(
    "bitplanes_linear(Tensor x, Tensor planes, Tensor scale, Tensor offset, Tensor? bias, "
    "int in_features, int group_size) -> Tensor"
)


def check_activations(
    x: Tensor, weight: Tensor, in_features: int, dtypes: Collection[torch.dtype] | None = None
) -> None:
    """Refuse activations that do not fit a weight, also while torch.compile traces.

    Args:
        x: ``[..., in_features]``.
        weight: any tensor of the weight, for its device.
        dtypes: of activations that the kernel takes; None: all floating point.

    Raises:
        RuntimeError: dtype, number of features or device are wrong; the message names both.
    """
    torch._check(
        x.is_floating_point() if dtypes is None else x.dtype in dtypes,
        lambda: f"activations must be {_words(dtypes)}, not {x.dtype}",
    )
    torch._check(
        x.shape[-1] == in_features,
        lambda: f"activations have {x.shape[-1]} features, the weight takes {in_features}",
    )
    torch._check(
        x.device == weight.device,
        lambda: f"activations are on {x.device}, the weight on {weight.device}",
    )


def _words(dtypes: Collection[torch.dtype] | None) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes or ()]
    return " or ".join(names) or "floating point"


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
    check_activations(x, planes, in_features)
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
    check_activations(x, planes, in_features)
    weight = BitPlanes(planes, scale, offset, in_features, group_size).unpack(torch.float32)
    bias = bias if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


library.impl("bitplanes_linear", _bitplanes_linear, "CompositeExplicitAutograd")
