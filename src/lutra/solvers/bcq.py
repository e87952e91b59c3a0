"""Binary-coding solvers: signs, scales per plane and an offset that fit weights group by group.

    minimise  sum_i h_i (w_i - z - sum_q alpha_q b_qi)^2   over  b in {-1, +1},  alpha,  z

Greedy (sign of the residual, plane after plane), refined (greedy, then least squares for the
scales) and alternating (least squares for the scales, exact nearest level for the signs, repeated)
are the solvers of Xu et al. 2018 as LUT-GEMM (arXiv 2206.09557) uses them; the offset joins the
least squares as one more unknown, which is what makes uniform grids representable.

Everything is batched over groups. Shape suffixes: N groups (any batch), S inputs of a group,
Q planes, L = 2^Q levels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def plane_signs(planes: int, device: torch.device | None = None) -> Tensor:
    """Signs of each level's code, ``[2^planes, planes]``; row c is code c, plane 0 its top bit."""
    codes = torch.arange(2**planes, device=device)
    shifts = torch.arange(planes - 1, -1, -1, device=device)
    return (((codes[:, None] >> shifts) & 1) * 2 - 1).to(torch.float32)


def levels_of(alpha_NQ: Tensor, offset_N: Tensor) -> Tensor:
    """Value of every code, ``[N, 2^Q]``."""
    signs_LQ = plane_signs(alpha_NQ.shape[-1], alpha_NQ.device).to(alpha_NQ.dtype)
    return alpha_NQ @ signs_LQ.T + offset_N[..., None]


def nearest_codes(weight_NS: Tensor, alpha_NQ: Tensor, offset_N: Tensor) -> Tensor:
    """Code of the nearest level for every weight, by bisection over the sorted levels.

    Returns:
        int64 ``[N, S]`` codes in [0, 2^Q).
    """
    sorted_NL, order_NL = levels_of(alpha_NQ, offset_N).sort(dim=-1)
    midpoints = (sorted_NL[:, 1:] + sorted_NL[:, :-1]) / 2
    rank_NS = torch.searchsorted(midpoints.contiguous(), weight_NS.contiguous())
    return order_NL.gather(-1, rank_NS)


def fit_scales(
    weight_NS: Tensor, signs_NSQ: Tensor, importance_NS: Tensor, ridge: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Weighted least squares for the scales and the offset, given the signs.

    Args:
        weight_NS, importance_NS: weights and their non-negative importance.
        signs_NSQ: +1 / -1.
        ridge: damping relative to the mean diagonal; keeps degenerate groups (equal planes,
            constant weights) solvable.

    Returns:
        alpha ``[N, Q]`` and offset ``[N]``. A negative alpha is legitimate: it swaps the meaning of
        a plane's bits.
    """
    ones = torch.ones_like(signs_NSQ[..., :1])
    basis_NSP = torch.cat([signs_NSQ, ones], dim=-1)
    weighted_NSP = basis_NSP * importance_NS[..., None]
    gram_NPP = weighted_NSP.mT @ basis_NSP
    moment_NP = (weighted_NSP.mT @ weight_NS[..., None]).squeeze(-1)
    trace_N = gram_NPP.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping_N = torch.where(trace_N > 0, trace_N * ridge, torch.ones_like(trace_N))
    eye = torch.eye(gram_NPP.shape[-1], dtype=gram_NPP.dtype, device=gram_NPP.device)
    solution_NP = torch.linalg.solve(gram_NPP + damping_N[:, None, None] * eye, moment_NP)
    return solution_NP[:, :-1], solution_NP[:, -1]


def greedy(weight_NS: Tensor, planes: int, importance_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Plane after plane: the sign of the residual and its mean magnitude.

    Returns:
        alpha ``[N, Q]`` and offset ``[N]`` (the weighted mean of the group).
    """
    total_N = importance_NS.sum(-1).clamp_min(torch.finfo(weight_NS.dtype).tiny)
    offset_N = (importance_NS * weight_NS).sum(-1) / total_N
    residual_NS = weight_NS - offset_N[:, None]
    alphas = []
    for _ in range(planes):
        alpha_N = (importance_NS * residual_NS.abs()).sum(-1) / total_N
        residual_NS = residual_NS - torch.where(residual_NS >= 0, 1.0, -1.0) * alpha_N[:, None]
        alphas.append(alpha_N)
    return torch.stack(alphas, dim=-1), offset_N


def uniform_start(weight_NS: Tensor, planes: int, importance_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offset of the min-max uniform grid, the other natural place to start from."""
    low_N, high_N = weight_NS.amin(-1), weight_NS.amax(-1)
    step_N = (high_N - low_N) / (2**planes - 1)
    powers_Q = 2.0 ** torch.arange(planes - 2, -2, -1, device=weight_NS.device)
    return step_N[:, None] * powers_Q.to(weight_NS.dtype), (low_N + high_N) / 2


Start = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


def alternating(
    weight_NS: Tensor,
    planes: int,
    importance_NS: Tensor | None = None,
    rounds: int = 15,
    starts: tuple[Start, ...] = (greedy, uniform_start),
) -> tuple[Tensor, Tensor]:
    """Alternate nearest levels and least squares from several starts; the best end is kept.

    ``rounds=0`` is the plain start (with ``starts=(greedy,)`` the greedy solver), ``rounds=1`` the
    refined solver. The loss never rises from one round to the next, so neither does the result.

    Args:
        weight_NS: weights, one row per group.
        planes: 1 to 8.
        importance_NS: non-negative importance of each weight (1 where None), for example the
            diagonal of the Hessian.
        rounds: iterations.

    Returns:
        alpha ``[N, Q]``, sorted by falling magnitude and not negative, and offset ``[N]``.
    """
    if importance_NS is None:
        importance_NS = torch.ones_like(weight_NS)
    signs_LQ = plane_signs(planes, weight_NS.device).to(weight_NS.dtype)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for start in starts:
        alpha_NQ, offset_N = start(weight_NS, planes, importance_NS)
        loss_N = _loss(weight_NS, alpha_NQ, offset_N, importance_NS)
        for _ in range(rounds):
            codes_NS = nearest_codes(weight_NS, alpha_NQ, offset_N)
            new_alpha, new_offset = fit_scales(weight_NS, signs_LQ[codes_NS], importance_NS)
            new_loss = _loss(weight_NS, new_alpha, new_offset, importance_NS)
            better_N = new_loss < loss_N  # false for NaN too: such a group keeps what it had
            if not better_N.any():
                break
            alpha_NQ = torch.where(better_N[:, None], new_alpha, alpha_NQ)
            offset_N = torch.where(better_N, new_offset, offset_N)
            loss_N = torch.where(better_N, new_loss, loss_N)
        if best is None:
            best = alpha_NQ, offset_N, loss_N
        else:
            better_N = loss_N < best[2]
            best = (
                torch.where(better_N[:, None], alpha_NQ, best[0]),
                torch.where(better_N, offset_N, best[1]),
                torch.where(better_N, loss_N, best[2]),
            )
    assert best is not None
    # Flipping the sign of an alpha, or the order of planes, only renames the codes.
    return best[0].abs().sort(dim=-1, descending=True).values, best[1]


def _loss(weight_NS: Tensor, alpha_NQ: Tensor, offset_N: Tensor, importance_NS: Tensor) -> Tensor:
    codes_NS = nearest_codes(weight_NS, alpha_NQ, offset_N)
    fitted_NS = levels_of(alpha_NQ, offset_N).gather(-1, codes_NS)
    return (importance_NS * (weight_NS - fitted_NS).square()).sum(-1)
