"""Find the range of a uniform grid: plain min-max, or the shrunk range with the least error.

Shape suffixes: N groups, S inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.solvers.levels import UniformLevels


def min_max(weight_NS: Tensor, bits: int, shrink_N: Tensor | float = 1.0) -> UniformLevels:
    """The grid between the smallest and the largest weight of each group.

    At 1 bit the two levels would lie at the extremes; they go to the mean plus and minus the mean
    deviation instead, which is the least-squares answer for symmetric weights.
    """
    if bits == 1:
        mean_N = weight_NS.mean(-1)
        deviation_N = (weight_NS - mean_N[:, None]).abs().mean(-1)
        return UniformLevels(2 * deviation_N * shrink_N, mean_N, bits)
    low_N, high_N = weight_NS.amin(-1) * shrink_N, weight_NS.amax(-1) * shrink_N
    return UniformLevels((high_N - low_N) / (2**bits - 1), (low_N + high_N) / 2, bits)


def with_integer_zero(levels: UniformLevels) -> UniformLevels:
    """The grid with an integer code for zero, as formats with a stored zero point need.

    A grid that does not reach zero is widened to it first, so that the zero point lies among the
    codes; then it moves by less than half a step.
    """
    last = 2**levels.bits - 1
    reach_N = levels.step_N * levels.center
    low_N = (levels.offset_N - reach_N).clamp_max(0)
    high_N = (levels.offset_N + reach_N).clamp_min(0)
    outside_N = (low_N == 0) | (high_N == 0)
    step_N = torch.where(outside_N, (high_N - low_N) / last, levels.step_N)
    safe_N = torch.where(step_N == 0, 1.0, step_N)
    zero_point_N = (-low_N / safe_N).round().clamp(0, last)
    return UniformLevels(step_N, step_N * (levels.center - zero_point_N), levels.bits)


def search_clip(
    weight_NS: Tensor,
    bits: int,
    importance_NS: Tensor | None = None,
    steps: int = 40,
    smallest: float = 0.4,
) -> UniformLevels:
    """The min-max range shrunk by the factor that gives the least weighted squared error.

    Args:
        weight_NS: weights, one row per group.
        bits: width of the codes.
        importance_NS: importance of each weight, for example the diagonal of the Hessian.
        steps: candidates between 1 and ``smallest``.
        smallest: the hardest clipping tried.
    """
    if importance_NS is None:
        importance_NS = torch.ones_like(weight_NS)
    best = min_max(weight_NS, bits)
    best_loss_N = torch.full_like(weight_NS[:, 0], torch.inf)
    for shrink in torch.linspace(1.0, smallest, steps).tolist():
        levels = min_max(weight_NS, bits, shrink)
        error_NS = levels.nearest(weight_NS)[1] - weight_NS
        loss_N = (importance_NS * error_NS.square()).sum(-1)
        better_N = loss_N < best_loss_N
        best_loss_N = torch.where(better_N, loss_N, best_loss_N)
        best = UniformLevels(
            torch.where(better_N, levels.step_N, best.step_N),
            torch.where(better_N, levels.offset_N, best.offset_N),
            bits,
        )
    return best
