"""What a flattened layer can compute of its input on the way to integers: a norm or an activation.

A norm before a layer, and the activation before the last layer of an MLP, are read by flattened
layers alone. A kernel that computes them while it quantizes saves writing and reading them in 16
bits. Here is what they are; :func:`apply` computes them by themselves, as the modules of PyTorch
and transformers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")


@dataclass(frozen=True, eq=False)
class Norm:
    """The RMS norm of ``x``, or its layer norm.

    Attributes:
        weight: ``[in]`` in the dtype of ``x``.
        epsilon: added to the mean of squares, or to the variance.
        bias: ``[in]`` of a layer norm in the dtype of ``x``; a layer norm without one has zeros.
            None makes it an RMS norm, ``weight * round(x / sqrt(mean(x^2) + epsilon))``.
    """

    weight: Tensor
    epsilon: float
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Activation:
    """``act(x)``, or ``act(x) * times``; both steps rounded to the dtype of ``x``.

    Attributes:
        name: one of :data:`ACTIVATIONS`.
        times: of the shape and dtype of ``x``, or None.
    """

    name: str
    times: Tensor | None = None


Before = Norm | Activation


def apply(x: Tensor, before: Before) -> Tensor:
    """What comes before the layer, by itself, ``[..., in]``."""
    if isinstance(before, Norm):
        if before.bias is not None:
            shape = (x.shape[-1],)
            return torch.nn.functional.layer_norm(
                x, shape, before.weight, before.bias, before.epsilon
            )
        wide = x.float()
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + before.epsilon)
        return before.weight * (wide * factor).to(x.dtype)
    if before.name == "silu":
        y = torch.nn.functional.silu(x)
    elif before.name == "relu":
        y = torch.relu(x)
    else:
        form = "tanh" if before.name == "gelu_tanh" else "none"
        y = torch.nn.functional.gelu(x, approximate=form)
    return y if before.times is None else y * before.times
