"""How far a quantized model's predictions are from the original's, token by token.

    KL(p || q) = sum_v p(v) (log p(v) - log q(v)),   p of the original, q of the quantized model

exact over the whole vocabulary, in nats, from float32 log-softmax; and whether both models rank the
same token first. KL separates models whose perplexities look alike: errors that happen to favour
the text at hand lower the perplexity but never the divergence.

Shape suffixes: B windows of a batch, L tokens of a window, V vocabulary, N predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.errors import CheckpointError
from lutra.evaluate.perplexity import logit_slices


def divergence(reference_BLV: Tensor, logits_BLV: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence and top-1 agreement of each predicted token.

    Args:
        reference_BLV: logits of the original model, any float dtype.
        logits_BLV: logits of the quantized model.

    Returns:
        KL in nats, float32 ``[B, L - 1]``, and bool ``[B, L - 1]``: the same most likely token.

    Raises:
        CheckpointError: the two vocabularies differ in size.
    """
    if reference_BLV.shape != logits_BLV.shape:
        raise CheckpointError(
            f"the original predicts {reference_BLV.shape[-1]:,} tokens and the quantized model "
            f"{logits_BLV.shape[-1]:,}: they can not be compared. Is --against the model that "
            "was quantized?"
        )
    batch, length = logits_BLV.shape[:2]
    kl_N = torch.empty(batch * (length - 1), dtype=torch.float32, device=logits_BLV.device)
    same_N = torch.empty(kl_N.shape, dtype=torch.bool, device=logits_BLV.device)
    slices = zip(logit_slices(reference_BLV), logit_slices(logits_BLV), strict=True)
    for (where, p_NV), (_, q_NV) in slices:
        log_p_NV = torch.log_softmax(p_NV.float(), -1)
        log_q_NV = torch.log_softmax(q_NV.float(), -1)
        p = log_p_NV.exp()
        # A token that the original excludes (logit -inf) has p = 0 and adds nothing; computed
        # literally it would be 0 * (-inf - ...) = NaN.
        terms_NV = torch.where(p > 0, p * (log_p_NV - log_q_NV), 0.0)
        # Rounding can leave -1e-8 where the two agree; the divergence itself is never negative.
        kl_N[where] = terms_NV.sum(-1).clamp_min(0)
        same_N[where] = p_NV.argmax(-1) == q_NV.argmax(-1)
    return kl_N.view(batch, -1), same_N.view(batch, -1)


def quantile(values_N: Tensor, q: float) -> float:
    """The q-quantile, linearly interpolated. (``torch.quantile`` stops at 2^24 values.)"""
    ordered = values_N.flatten().double().sort().values
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], position - low))
