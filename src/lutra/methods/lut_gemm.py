"""LUT-GEMM: weights as bit planes with scales and an offset per group, multiplied through tables.

Park et al.: "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in
Large-Scale Generative Language Models" (ICLR 2024, arXiv 2206.09557). The format is the paper's
extended binary coding (section 3): ``w = sum_q alpha_q b_q + z``. With the format ``bcq`` the
scales are free; with ``ubcq`` they halve from plane to plane, which is a uniform grid and stores
one scale per group instead of one per plane.

Three ways to fill it:

- *weight only* (``calibrated=false``): greedy, refined or alternating solver on the weights alone,
  which is the paper's own method.
- *calibrated* (default): levels of a group from the alternating solver (``bcq``) or a clip search
  (``ubcq``) weighted with 1 / U_jj^2, error feedback to the columns not yet quantized (GPTQ's
  loop), then rounds of exact coordinate descent on the codes and least squares for all scales of a
  row under the whole Hessian (`lutra.solvers.gptq_loop.descend`).
- *reconstructed* (``reconstruct=true``): from there, scales, offsets and, through a rounding
  variable, the signs are trained on the output of the whole block
  (`lutra.solvers.train_block`).

Where we differ from the paper: it takes weights from round-to-nearest or weight-only binary coding;
error feedback, descent and reconstruction are what makes 2 and 3 bits usable.

``serve_bits`` builds the planes from the fewest bits up, as AnyBCQ (arXiv 2510.10467) does: planes
already chosen are frozen, one more plane splits every level in two, and each precision has scales
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutra.methods import Block, InputStatistics, Result, check_choice, check_range, method
from lutra.methods.pack import pack, sorted_planes
from lutra.scheme import Format
from lutra.solvers import bcq, ranges
from lutra.solvers.gptq_loop import (
    Solution,
    add_plane,
    damped,
    descend,
    quantize_with_feedback,
    round_to_nearest,
)
from lutra.solvers.levels import FreeLevels, Levels
from lutra.solvers.parallel import map_layers
from lutra.solvers.train_block import TrainingOptions, train_block

SOLVERS = ("greedy", "refined", "alternating")


@dataclass(frozen=True)
class Options:
    """Options of ``lut-gemm``.

    Attributes:
        calibrated: use the Hessian of the inputs; false is the weight-only mode.
        solver: of the levels in the weight-only and ``bcq`` modes.
        damping: fraction of the mean diagonal added to H.
        rounds: rounds of coordinate descent after the error feedback.
        follow_original: aim at the original model's activations: the weights are first shifted to
            ``W E[x_original x^T] H^-1``, which undoes what earlier layers' errors do to the input.
        reconstruct: train on the block's output.
        steps: training steps of each block.
        batch: calibration samples in a step.
        learning_rate: of the rounding variables, in codes.
        scale_learning_rate: of scales and offsets, relative to a typical scale of the matrix.
    """

    calibrated: bool = True
    solver: str = "alternating"
    damping: float = 0.01
    rounds: int = 4
    follow_original: bool = False
    reconstruct: bool = False
    steps: int = 200
    batch: int = 8
    learning_rate: float = 0.01
    scale_learning_rate: float = 0.001

    def __post_init__(self) -> None:
        check_choice("lut-gemm", "solver", self.solver, SOLVERS)
        for option, least in (
            ("damping", 0), ("rounds", 0), ("steps", 0), ("batch", 1), ("learning_rate", 0),
            ("scale_learning_rate", 0),
        ):  # fmt: skip
            check_range("lut-gemm", option, getattr(self, option), least)


def _needs(options: Options) -> frozenset[str]:
    needs = {"hessian"} if options.calibrated else set()
    if options.calibrated and options.follow_original:
        needs.add("shift")
    if options.reconstruct:
        needs.add("block")
    return frozenset(needs)


@method(
    "lut-gemm",
    paper="LUT-GEMM, ICLR 2024, arXiv 2206.09557",
    options=Options,
    formats=("ubcq", "bcq"),
    needs=_needs,
)
def quantize(block: Block, options: Options) -> Result:
    def solve(path: str, weight_OI: Tensor) -> dict[int, Solution]:
        return _ladder(weight_OI, block.inputs.get(path), block.formats[path], options)

    ladders = map_layers(solve, block.weights)
    solutions = {path: ladder.pop(max(ladder)) for path, ladder in ladders.items()}
    served = {path: ladder for path, ladder in ladders.items() if ladder}
    notes: dict[str, Any] = {}
    if options.reconstruct and block.runner is not None:
        training = TrainingOptions(
            options.steps,
            options.batch,
            options.learning_rate,
            options.scale_learning_rate,
            block.seed,
        )
        # Planes shared by several precisions stay; then only scales and offsets are trained.
        shared = bool(served)
        solutions, notes = train_block(
            block.weights, solutions, block.runner, training, train_codes=not shared
        )
        for bits in sorted({b for ladder in served.values() for b in ladder}):
            lower = {path: ladder[bits] for path, ladder in served.items() if bits in ladder}
            lower, _ = train_block(block.weights, lower, block.runner, training, train_codes=False)
            for path, solution in lower.items():
                served[path][bits] = solution
    packed = {}
    for path, solution in solutions.items():
        if block.formats[path].kind == "bcq" and path not in served:
            solution = sorted_planes(solution)
        packed[path] = pack(solution, block.formats[path], served.get(path))
    return Result(packed, notes=notes)


def _ladder(
    weight_OI: Tensor, statistics: InputStatistics | None, format: Format, options: Options
) -> dict[int, Solution]:
    """Solutions by width: the full one, and those of ``serve_bits``, which share its planes."""
    hessian_II = None
    if options.calibrated and statistics is not None:
        hessian_II = statistics.hessian_II
        if options.follow_original:
            weight_OI = shifted_target(weight_OI, statistics, options.damping)
    wanted = (*format.serve_bits, format.bits)
    solution = _solve(weight_OI, hessian_II, format, min(wanted), options)
    ladder = {min(wanted): solution}
    if len(wanted) > 1:
        inputs = weight_OI.shape[1]
        matrix_II = torch.eye(inputs) if hessian_II is None else hessian_II
        matrix_II = damped(matrix_II.to(weight_OI), options.damping)
        for bits in range(min(wanted) + 1, format.bits + 1):
            solution = add_plane(weight_OI, matrix_II, solution)
            if bits in wanted:
                ladder[bits] = solution
    return ladder


def shifted_target(weight_OI: Tensor, statistics: InputStatistics, damping: float) -> Tensor:
    """Weights that on the quantized model's input best give the original output."""
    assert statistics.shift_II is not None
    matrix_II = damped(statistics.hessian_II, damping).double()
    correction_II = torch.linalg.solve(matrix_II, statistics.shift_II.double().T).T
    return weight_OI + weight_OI @ correction_II.to(weight_OI.dtype)


def _solve(
    weight_OI: Tensor, hessian_II: Tensor | None, format: Format, bits: int, options: Options
) -> Solution:
    group_size = format.group_size_for(weight_OI.shape[1])
    rounds = {"greedy": 0, "refined": 1, "alternating": 15}[options.solver]
    starts = (bcq.greedy,) if rounds < 2 else (bcq.greedy, bcq.uniform_start)

    def find(weight_OS: Tensor, importance_S: Tensor) -> Levels:
        importance_OS = importance_S.expand_as(weight_OS).contiguous()
        if format.kind == "ubcq":
            return ranges.search_clip(weight_OS, bits, importance_OS)
        alpha, offset = bcq.alternating(weight_OS, bits, importance_OS, rounds, starts)
        return FreeLevels(alpha, offset)

    if hessian_II is None:
        return round_to_nearest(weight_OI, group_size, find)
    solution = quantize_with_feedback(weight_OI, hessian_II, group_size, find, options.damping)
    return descend(weight_OI, hessian_II, solution, options.rounds, options.damping)
