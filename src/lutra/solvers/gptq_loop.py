"""Error feedback: quantize column after column, and let the columns still to come absorb the error.

    minimise  tr((W - W^) H (W - W^)^T),   H = X^T X

Frantar et al. 2023 (GPTQ / OPTQ, arXiv 2210.17323): with U the upper Cholesky factor of H^-1, the
error of column j, divided by U_jj, times U[j, j+1:] is taken from the later columns. What a group's
levels are is decided by a callable when the loop reaches the group, on weights that already carry
the feedback; so the same loop serves integer grids (GPTQ), clipped grids and binary-coded levels.

`descend` improves such a solution: it revisits every column with the others fixed (exact coordinate
minimisation of the same loss) and refits all scales of a row at once against the whole H.

Shape suffixes: O out features, I in features, S inputs of a group, G groups, P scales of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.errors import CalibrationError
from lutra.solvers.bcq import plane_signs
from lutra.solvers.levels import FreeLevels, Levels, UniformLevels

FindLevels = Callable[[Tensor, Tensor], UniformLevels | FreeLevels]
"""``(weight [O, S], importance [S]) -> levels``."""


REFIT_BYTES = 1 << 27
"""Memory for the float64 normal matrices of :func:`refit_levels`."""


@dataclass
class Solution:
    """Codes and levels of one weight matrix.

    Attributes:
        codes_OI: int64 codes.
        levels: one entry per group of inputs.
        group_size: inputs per group.
    """

    codes_OI: Tensor
    levels: list[Levels]
    group_size: int

    def decode(self) -> Tensor:
        """The dense weight ``[out, in]`` that the codes and levels stand for."""
        parts = self.codes_OI.split(self.group_size, dim=1)
        return torch.cat([lv.decode(c) for lv, c in zip(self.levels, parts, strict=True)], dim=1)


def damped(hessian_II: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added; inputs never seen get a diagonal of 1.

    A dead input (zero row and column) leaves its weights free; the identity there quantizes them to
    the nearest level and feeds nothing back.
    """
    hessian_II = hessian_II.clone()
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean()
    diagonal_I += torch.where(diagonal_I == 0, mean.clamp_min(1e-12), 0)
    diagonal_I += damping * mean
    return hessian_II


def inverse_cholesky(hessian_II: Tensor) -> Tensor:
    """Upper U with U^T U = H^-1, in float64 inside; the damping is raised until H is definite.

    Raises:
        CalibrationError: H is not finite, which no damping mends.
    """
    matrix = hessian_II.double()
    if not torch.isfinite(matrix).all():
        raise CalibrationError(
            "the statistics of a layer's inputs are not finite: activations of the calibration "
            "text are too large. Is the checkpoint intact?"
        )
    boost = 1e-8 * matrix.diagonal().mean()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:
        # H = R R^T with R upper, from the Cholesky factor of H read backwards; then U = R^-1. This
        # spares H^-1 and a second factorization, most of the work.
        lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if torch.isfinite(upper).all():
                return upper.to(hessian_II.dtype)
        boost = boost * 10
        matrix = matrix + boost * eye


def round_to_nearest(weight_OI: Tensor, group_size: int, find_levels: FindLevels) -> Solution:
    """Every weight to its nearest level, nothing fed back."""
    codes: list[Tensor] = []
    levels: list[Levels] = []
    for part_OS in weight_OI.split(group_size, dim=1):
        found = find_levels(part_OS, torch.ones_like(part_OS[0]))
        codes.append(found.nearest(part_OS)[0])
        levels.append(found)
    return Solution(torch.cat(codes, dim=1), levels, group_size)


def quantize_with_feedback(
    weight_OI: Tensor,
    hessian_II: Tensor,
    group_size: int,
    find_levels: FindLevels,
    damping: float = 0.01,
) -> Solution:
    """The GPTQ loop. ``find_levels`` sees a group's weights and each input's importance 1 / U_jj^2.

    Args:
        weight_OI: float32 weights; not changed.
        hessian_II: ``X^T X`` (any scale), undamped.
        group_size: inputs per group; the last group may be shorter.
        damping: fraction of the mean diagonal added to H.
    """
    upper_II = inverse_cholesky(damped(hessian_II, damping))
    # Columns are rows here, so that each step works on contiguous memory. A copy in any case: the
    # transpose of a single row is contiguous already.
    weight_IO = weight_OI.t().clone(memory_format=torch.contiguous_format)
    codes: list[Tensor] = []
    levels: list[Levels] = []
    for start in range(0, len(weight_IO), group_size):
        stop = min(start + group_size, len(weight_IO))
        block_SO, upper_SS = weight_IO[start:stop], upper_II[start:stop, start:stop]
        found = find_levels(block_SO.t().contiguous(), upper_SS.diagonal().reciprocal().square())
        error_SO = torch.empty_like(block_SO)
        for j in range(stop - start):
            code_O1, value_O1 = found.nearest(block_SO[j][:, None])
            error_SO[j] = (block_SO[j] - value_O1[:, 0]) / upper_SS[j, j]
            block_SO[j + 1 :] -= torch.outer(upper_SS[j, j + 1 :], error_SO[j])
            codes.append(code_O1)
        weight_IO[stop:] -= upper_II[start:stop, stop:].t() @ error_SO
        levels.append(found)
    return Solution(torch.cat(codes, dim=1), levels, group_size)


def round_integers_with_feedback(
    weight_OI: Tensor, upper_II: Tensor, scale_O: Tensor, limit_I: Tensor, block: int = 128
) -> Tensor:
    """The GPTQ loop for integers on one grid per row, with a range of its own for each input.

    The grid is known before the loop, so the error of a block of columns reaches the columns behind
    it in one product.

    Args:
        weight_OI: float32 weights; not changed.
        upper_II: upper U with U^T U = H^-1, see :func:`inverse_cholesky`.
        scale_O: what an integer of 1 is worth in each row, positive.
        limit_I: largest integer of each input.
        block: columns whose feedback is gathered.

    Returns:
        Integers as float32 ``[out, in]``.
    """
    weight_IO = weight_OI.t().clone(memory_format=torch.contiguous_format)
    integers_IO = torch.empty_like(weight_IO)
    limits = limit_I.tolist()
    for start in range(0, len(weight_IO), block):
        stop = min(start + block, len(weight_IO))
        part_SO, upper_SS = weight_IO[start:stop], upper_II[start:stop, start:stop]
        diagonal = upper_SS.diagonal().tolist()
        error_SO = torch.empty_like(part_SO)
        for j in range(stop - start):
            most = limits[start + j]
            integer_O = (part_SO[j] / scale_O).round_().clamp_(-most, most)
            integers_IO[start + j] = integer_O
            torch.sub(part_SO[j], integer_O.mul_(scale_O), out=error_SO[j])
            error_SO[j] /= diagonal[j]
            part_SO[j + 1 :].addr_(upper_SS[j, j + 1 :], error_SO[j], alpha=-1)
        weight_IO[stop:] -= upper_II[start:stop, stop:].t() @ error_SO
    return integers_IO.t().contiguous()


def refit_scales(
    weight_OI: Tensor,
    hessian_II: Tensor,
    integers_OI: Tensor,
    scale_O: Tensor,
    together: list[slice] | None = None,
) -> Tensor:
    """The scale of every row that is best for its integers: ``s = (w H q) / (q H q)``.

    Args:
        hessian_II: damped.
        scale_O: what a row keeps that has no integers but 0, or would need a scale below 0.
        together: rows that share one scale; None gives each row its own.
    """
    product_OI = integers_OI @ hessian_II
    above_O = (product_OI * weight_OI).sum(1)
    below_O = (product_OI * integers_OI).sum(1)
    for rows in together or ():
        above_O[rows], below_O[rows] = above_O[rows].sum(), below_O[rows].sum()
    usable_O = (above_O > 0) & (below_O > 0)
    return torch.where(usable_O, above_O / below_O.clamp_min(1e-30), scale_O)


def descend_integers(
    weight_OI: Tensor,
    hessian_II: Tensor,
    integers_OI: Tensor,
    scale_O: Tensor,
    limit_I: Tensor,
    block: int = 128,
) -> Tensor:
    """One pass of exact coordinate minimisation over the columns, scales kept; see
    :func:`descend_codes`. The loss cannot rise.

    Args:
        hessian_II: damped.
        integers_OI: integers as float32, such as :func:`round_integers_with_feedback` gives; not
            changed.
        limit_I: largest integer of each input.
    """
    integers_IO = integers_OI.t().clone(memory_format=torch.contiguous_format)
    gradient_IO = hessian_II @ (weight_OI.t() - integers_IO * scale_O)
    diagonal, limits = hessian_II.diagonal().tolist(), limit_I.tolist()
    for start in range(0, len(integers_IO), block):
        stop = min(start + block, len(integers_IO))
        hessian_SS = hessian_II[start:stop, start:stop]
        gradient_SO = gradient_IO[start:stop].clone()
        change_SO = torch.empty_like(gradient_SO)
        for j in range(stop - start):
            i = start + j
            current_O = integers_IO[i]
            wanted_O = torch.addcdiv(current_O, gradient_SO[j], scale_O, value=1 / diagonal[i])
            wanted_O.round_().clamp_(-limits[i], limits[i])
            torch.sub(wanted_O, current_O, out=change_SO[j])
            change_SO[j] *= scale_O
            integers_IO[i] = wanted_O
            # Only columns still to come read the gradient again.
            gradient_SO[j + 1 :].addr_(hessian_SS[j, j + 1 :], change_SO[j], alpha=-1)
        gradient_IO[stop:] -= hessian_II[stop:, start:stop] @ change_SO
    return integers_IO.t().contiguous()


def output_error(weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor) -> float:
    """||X (W - W^)^T||^2 / ||X W^T||^2, the relative squared error of the layer's output."""
    error_OI = weight_OI - quantized_OI
    signal = ((weight_OI @ hessian_II) * weight_OI).sum()
    return float(((error_OI @ hessian_II) * error_OI).sum() / signal.clamp_min(1e-30))


def refit_levels(weight_OI: Tensor, hessian_II: Tensor, solution: Solution) -> Solution:
    """All scales and offsets of a row at once, least squares under the whole H, codes kept.

    With B the block matrix of the codes' signs, a = (B^T H B)^-1 B^T H w. Rows are independent;
    as many are solved together as keep the normal matrices below `REFIT_BYTES`.
    """
    first = solution.levels[0]
    if isinstance(first, UniformLevels):
        codes_L = torch.arange(2**first.bits, device=weight_OI.device)
        per_code = (codes_L - first.center).to(weight_OI.dtype)[:, None]
    else:
        per_code = plane_signs(first.alpha_NQ.shape[1], weight_OI.device).to(weight_OI.dtype)
    table_LP = torch.cat([per_code, torch.ones_like(per_code[:, :1])], dim=1)
    in_features, group_size = weight_OI.shape[1], solution.group_size
    groups, unknowns = len(solution.levels), table_LP.shape[1]
    bounds = [(g * group_size, min((g + 1) * group_size, in_features)) for g in range(groups)]
    rows = max(1, min(256, REFIT_BYTES // (8 * (groups * unknowns) ** 2)))
    fitted = []
    for first_row in range(0, weight_OI.shape[0], rows):
        rows_RI = weight_OI[first_row : first_row + rows]
        basis_RIP = table_LP[solution.codes_OI[first_row : first_row + rows]]
        count = len(rows_RI)
        gram = rows_RI.new_empty(count, groups, unknowns, groups, unknowns)
        for g, (start, stop) in enumerate(bounds):
            part_RSP = basis_RIP[:, start:stop]
            product_RIP = torch.einsum("is,rsp->rip", hessian_II[:, start:stop], part_RSP)
            for k, (low, high) in enumerate(bounds):
                gram[:, k, :, g, :] = basis_RIP[:, low:high].mT @ product_RIP[:, low:high]
        weighted_RI = rows_RI @ hessian_II
        moment = rows_RI.new_empty(count, groups, unknowns)
        for g, (start, stop) in enumerate(bounds):
            moment[:, g] = (basis_RIP[:, start:stop].mT @ weighted_RI[:, start:stop, None])[..., 0]
        size = groups * unknowns
        matrix = gram.reshape(count, size, size).double()
        # Damping relative to each unknown keeps constant or single-level groups solvable.
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6).add_(1e-12 * matrix.abs().amax())
        solved = torch.linalg.solve(matrix, moment.reshape(count, size, 1).double())
        fitted.append(solved.reshape(count, groups, unknowns).to(weight_OI.dtype))
    scales_OGP = torch.cat(fitted)
    levels: list[Levels] = []
    for g in range(groups):
        offset_O = scales_OGP[:, g, -1].contiguous()
        if isinstance(first, UniformLevels):
            levels.append(UniformLevels(scales_OGP[:, g, 0].contiguous(), offset_O, first.bits))
        else:
            levels.append(FreeLevels(scales_OGP[:, g, :-1].contiguous(), offset_O))
    return Solution(solution.codes_OI, levels, group_size)


def descend_codes(
    weight_OI: Tensor, hessian_II: Tensor, solution: Solution, parents_OI: Tensor | None = None
) -> Solution:
    """One pass of exact coordinate minimisation over the columns, levels kept.

    Column j's best value with all others fixed is w^_j + (E H)_j / H_jj with E = W - W^; it goes to
    the nearest level. The loss cannot rise. Columns are taken in blocks so that the update of E H
    is a matrix product.

    Args:
        parents_OI: codes of all planes but the last, which then stay; only the last plane is free.
    """
    quantized_IO = solution.decode().t().contiguous()
    gradient_IO = hessian_II @ (weight_OI.t() - quantized_IO)
    codes = []
    for g, found in enumerate(solution.levels):
        start = g * solution.group_size
        stop = min(start + solution.group_size, len(quantized_IO))
        hessian_SS = hessian_II[start:stop, start:stop]
        gradient_SO = gradient_IO[start:stop].clone()
        change_SO = torch.empty_like(gradient_SO)
        for j in range(stop - start):
            current_O = quantized_IO[start + j]
            target_O1 = (current_O + gradient_SO[j] / hessian_SS[j, j])[:, None]
            if parents_OI is None:
                code_O1, value_O1 = found.nearest(target_O1)
            else:
                code_O1 = nearer_child(found, target_O1, parents_OI[:, start + j, None])
                value_O1 = found.decode(code_O1)
            torch.sub(value_O1[:, 0], current_O, out=change_SO[j])
            # Only columns still to come read the gradient again.
            gradient_SO[j + 1 :] -= torch.outer(hessian_SS[j, j + 1 :], change_SO[j])
            codes.append(code_O1)
        quantized_IO[start:stop] += change_SO
        gradient_IO -= hessian_II[:, start:stop] @ change_SO
    return Solution(torch.cat(codes, dim=1), solution.levels, solution.group_size)


def nearer_child(levels: Levels, weight_NS: Tensor, parents_NS: Tensor) -> Tensor:
    """Of the two codes that continue each parent code by one plane, the one nearer the weight."""
    low_NS, high_NS = parents_NS * 2, parents_NS * 2 + 1
    to_low = (weight_NS - levels.decode(low_NS)).abs()
    to_high = (weight_NS - levels.decode(high_NS)).abs()
    return torch.where(to_high < to_low, high_NS, low_NS)


def add_plane(
    weight_OI: Tensor, hessian_II: Tensor, solution: Solution, rounds: int = 4
) -> Solution:
    """One more plane under the planes of ``solution``, which stay as they are.

    The levels start as those of the solution, each split in two, and are then refitted.

    Args:
        hessian_II: damped.
        rounds: passes over the new plane's bits.
    """
    parents_OI = solution.codes_OI
    residual_OI = weight_OI - solution.decode()
    codes: list[Tensor] = []
    levels: list[Levels] = []
    parts = zip(
        solution.levels,
        weight_OI.split(solution.group_size, dim=1),
        residual_OI.split(solution.group_size, dim=1),
        parents_OI.split(solution.group_size, dim=1),
        strict=True,
    )
    for old, weight_OS, residual_OS, parents_OS in parts:
        new: Levels
        if isinstance(old, UniformLevels):
            new = UniformLevels(old.step_N / 2, old.offset_N, old.bits + 1)
        else:
            alpha_N1 = residual_OS.abs().mean(1, keepdim=True)
            new = FreeLevels(torch.cat([old.alpha_NQ, alpha_N1], dim=1), old.offset_N)
        codes.append(nearer_child(new, weight_OS, parents_OS))
        levels.append(new)
    solution = Solution(torch.cat(codes, dim=1), levels, solution.group_size)
    for _ in range(rounds):
        solution = refit_levels(weight_OI, hessian_II, solution)
        solution = descend_codes(weight_OI, hessian_II, solution, parents_OI)
    return refit_levels(weight_OI, hessian_II, solution)


def descend(
    weight_OI: Tensor, hessian_II: Tensor, solution: Solution, rounds: int, damping: float = 0.01
) -> Solution:
    """Alternate `refit_levels` and `descend_codes`; a row keeps the best it has seen.

    Args:
        rounds: passes over all columns; 0 refits the levels once.
    """
    matrix_II = damped(hessian_II, damping)
    solution = refit_levels(weight_OI, matrix_II, solution)
    for _ in range(rounds):
        solution = refit_levels(weight_OI, matrix_II, descend_codes(weight_OI, matrix_II, solution))
    return solution
