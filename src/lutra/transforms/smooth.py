"""Smoothing: move the range of large input channels from activations into weights.

    s_k = a_k^alpha / w_k^(1 - alpha),   X'[:, k] = X[:, k] / s_k,   W'[:, k] = W[:, k] s_k

Xiao et al.: "SmoothQuant" (ICML 2023, arXiv 2211.10438), section 4. ``a_k`` is the largest
activation of channel k, ``w_k`` its largest weight over all layers that read it. The scale is
centred here (its geometric mean is 1), which changes nothing in exact arithmetic and keeps folded
norms in the range that they had.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothing_scale(absmax_I: Tensor, weight_absmax_I: Tensor, alpha: float) -> Tensor:
    """The scale ``s``, float32 ``[in]``, positive and finite.

    Channels that are dead on either side (never active, or no weight reads them) get 1: any scale
    would do there, and a quotient of zeros would not.

    Args:
        absmax_I: largest activation of each channel.
        weight_absmax_I: largest weight of each channel over all layers that read it.
        alpha: 0 to 1, the share of the range that the weights take; 0 still makes the weights'
            channels equal, see the formula.
    """
    alive_I = (absmax_I > 0) & (weight_absmax_I > 0)
    if not bool(alive_I.any()):
        return torch.ones_like(absmax_I)
    log_I = alpha * absmax_I.clamp_min(1e-30).log() - (1 - alpha) * (
        weight_absmax_I.clamp_min(1e-30).log()
    )
    log_I = log_I - log_I[alive_I].mean()
    return torch.where(alive_I, log_I.clamp(-16, 16).exp(), 1.0)
