"""FlattenQuant: weights and activations in 4 or 8 bits, with few large channels made flat.

Zhang, Yang, Peng, Wang, Pan: "FlattenQuant: Breaking Through the Inference Compute-bound for Large
Language Models with Per-tensor Quantization" (arXiv 2402.17985). Large channels of a tensor are
expanded into several small ones, so that one scale serves the whole tensor, and the products are
computed in integers of 4 or 8 bits; channels are smoothed between activations and weights, and
GPTQ rounds the weights. The paper's body was not at hand when this was written. So the threshold,
the way 4 or 8 bits are chosen and all constants here are ours, and none is called the paper's.

For each group of linears that share an input (q, k, v; gate, up):

1. *Smooth*: ``s_k = a_k^alpha / w_k^(1-alpha)``, folded into what comes before where the family has
   such a place. alpha is the one of a few values with the least error of the output.
2. *Flatten*: the inputs get the smallest threshold that a budget of columns pays for
   (:mod:`lutra.transforms.flatten`), the weights as many second digits as pay off; what one side
   takes the other does not have. Weights beyond their range are clipped, and counted. How large a
   channel is, is its largest value or a power mean of its values, whichever has the least error.
   With ``rotate=hadamard``, inputs but the largest may be rotated in blocks before that
   (:mod:`lutra.transforms.rotate`), which helps where outliers belong to tokens.
3. *Round*: GPTQ with the Hessian of the quantized inputs, then one pass of coordinate descent
   between two fits of the scales. Before it, the weights take up what the rounding of the inputs
   does on average: ``W~ = W + W (X - X^)^T X^ (X^^T X^)^-1``.
4. *Choose* 4 or 8 bits for each group: see :mod:`lutra.solvers.choose_bits`.

Steps of activations belong to a token (``static=false``: nothing is ever clipped) or to the tensor
(``static=true``, the paper's contract: the fastest, clipped at what calibration has seen). Steps of
weights belong to an output channel, or to the tensor (``weight_scale=tensor``, the paper's contract
again); neither changes the integer product.

Shape suffixes: T tokens, O out features, I in features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lutra.architectures import (
    Architecture,
    FoldSite,
    expand_scale,
    reduce_scale,
)
from lutra.errors import CalibrationError
from lutra.formats.flat import FlatWeight, largest_digit, rotate_inputs
from lutra.kernels.flat import FlatSpec, choose
from lutra.kernels.flat.lowering import quantize_input
from lutra.methods import Block, check_choice, check_range, method
from lutra.solvers.gptq_loop import (
    damped,
    descend_integers,
    inverse_cholesky,
    refit_scales,
    round_integers_with_feedback,
)
from lutra.transforms.flatten import SCHEMES, column_budget, flatten
from lutra.transforms.rotate import blocks_to_rotate
from lutra.transforms.smooth import smoothing_scale

SEARCH_TOKENS, SEARCH_OUTPUTS = 256, 96
"""Tokens and outputs on which thresholds and alpha are compared."""
ALPHAS = (0.35, 0.5, 0.6, 0.7, 0.8)
WEIGHT_RANGES = (1.0, 0.85, 0.72, 0.6, 0.5)
"""Shares of a row's largest weight that are tried as its range."""
POWERS = (math.inf, 8.0, 4.0)
"""Powers of the means that are tried as the size of a channel; infinity is the largest value."""
ROTATIONS = (64, 128, 256)
"""Sizes of rotated blocks that are tried, where at least four of them fit."""
ROTATION_GAIN = 0.9
"""A rotation, which costs time, must lower the error to this share."""
CHUNK_BYTES = 2 << 20
"""Inputs are quantized in parts of so many bytes, which stay in the cache of one core."""
STATIC_RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the smallest threshold without clipping that are tried for static steps."""


@dataclass(frozen=True)
class Options:
    """Options of ``flattenquant``.

    Attributes:
        growth: columns that may be added, as a share of the inputs, before whole tiles are filled.
        static: one step for the tensor, from calibration; else each token has its own.
        budget: how much the perplexity may rise, as a share (0.01 is 1 %); on text that the weights
            were not fitted to, measured as the KL divergence of the logits.
        layers: ``mixed`` (chosen within the budget), ``int4`` or ``int8`` (all layers so, whatever
            it costs).
        inputs: ``same`` width as the weights, or ``int8``: 4-bit weights meet 8-bit activations,
            which costs nothing on multipliers that have no 4 bits (Hopper, CPUs). Such layers are
            not counted as 4-bit multiplies.
        smooth: ``fold`` (where the layer before can take the scale up) or ``none``.
        rotate: ``none``, or ``hadamard``: 4-bit inputs may be rotated in blocks, but for the
            largest channels, where that lowers the error. Costs a pass over the inputs at run time.
        weight_scale: ``channel`` (one for each output) or ``tensor``; then only norms take the
            scale of smoothing up.
        scheme: ``digits`` or ``unary``, how wide channels are paid for.
        tile: columns are counted in whole tiles of so many.
        compensate: whether weights answer for the rounding of the inputs.
        damping: fraction of the mean diagonal added to the Hessian.
        tokens: calibration tokens whose inputs the weights are fitted to, kept in memory.
        score_tokens: further tokens, which the weights are not fitted to, for choosing.
    """

    growth: float = 0.125
    static: bool = False
    budget: float = 0.01
    layers: str = "mixed"
    inputs: str = "same"
    smooth: str = "fold"
    rotate: str = "none"
    weight_scale: str = "channel"
    scheme: str = "digits"
    tile: int = 64
    compensate: bool = True
    damping: float = 0.01
    tokens: int = 8192
    score_tokens: int = 2048

    def __post_init__(self) -> None:
        name = "flattenquant"
        check_range(name, "growth", self.growth, 0, 4)
        check_range(name, "budget", self.budget, 0, 10)
        check_range(name, "tile", self.tile, 1, 4096)
        check_range(name, "damping", self.damping, 0)
        check_range(name, "tokens", self.tokens, 1)
        check_range(name, "score_tokens", self.score_tokens, 1)
        check_choice(name, "layers", self.layers, ("mixed", "int4", "int8"))
        check_choice(name, "inputs", self.inputs, ("same", "int8"))
        check_choice(name, "smooth", self.smooth, ("fold", "none"))
        check_choice(name, "rotate", self.rotate, ("none", "hadamard"))
        check_choice(name, "weight_scale", self.weight_scale, ("channel", "tensor"))
        check_choice(name, "scheme", self.scheme, SCHEMES)


@dataclass(frozen=True)
class Rung:
    """One step of the ladder that a group may come to stand on.

    Attributes:
        name: for people and for the record.
        bits: width of the weights' digits.
        input_bits: width of the activations' digits.
        growth: budget of further columns, as a share.
        static: whether the step of the activations is fixed.
    """

    name: str
    bits: int
    input_bits: int
    growth: float
    static: bool


SIXTEEN_BIT = "16 bit"


def ladder(options: Options, bits: int) -> list[Rung]:
    """The steps in the order in which they are tried; behind the last the weights stay as they are.

    Args:
        options: of the method.
        bits: 4, or 8 for no 4-bit layers at all.
    """
    g, static = options.growth, options.static
    wide = 8 if options.inputs == "int8" else 4
    rungs = []
    if bits == 4 and options.layers != "int8":
        rungs.append(Rung("int4", 4, wide, g, static))
        if g > 0 and options.layers == "mixed":
            rungs.append(Rung("int4 2x growth", 4, wide, 2 * g, static))
    if options.layers != "int4":
        rungs.append(Rung("int8", 8, 8, g, static))
        if static:  # else "int8" has a step for each token already
            rungs.append(Rung("int8 per token", 8, 8, g, False))
    return rungs


@dataclass
class Candidate:
    """A group of linears on one rung.

    Attributes:
        rung: the rung.
        weights: packed weights by path, as they stand behind the smoothing.
        smooth_I: what inputs are divided by, to be folded into what comes before; None if nothing.
        scale_C: the same at the outputs of the fold site's source.
        site: the fold site, or None.
        facts: what is recorded: growth, threshold, alpha, clipped shares, error of the output.
    """

    rung: Rung
    weights: dict[str, FlatWeight]
    smooth_I: Tensor | None
    scale_C: Tensor | None
    site: FoldSite | None
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, path: str, x: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer computes from inputs that are not smoothed, by the kernel of the device.

        Args:
            path: one of :attr:`weights`.
            x: ``[..., in]``; the result has its dtype.
        """
        weight, dtype = self.weights[path], x.dtype
        if self.smooth_I is not None:
            x = x.float() / self.smooth_I
        if weight.rotated is not None:
            x = rotate_inputs(x, weight.rotated)
        spec = FlatSpec(
            weight.out_features, weight.in_features, weight.columns, weight.bits,
            weight.step is not None, False, x.device, x.dtype,
        )  # fmt: skip
        kernel = choose(spec).kernel
        return kernel.linear(x, kernel.prepare(weight, spec), bias, spec).to(dtype)


def fold_site_of(group: Sequence[str], architecture: Architecture) -> FoldSite | None:
    """The fold site whose targets are just this group."""
    for site in architecture.folds:
        if set(site.targets) == set(group):
            return site
    return None


@dataclass
class _Group:
    """A group while it is solved: weights, inputs, and what all rungs share."""

    name: str
    weights: dict[str, Tensor]
    rows_TI: Tensor
    site: FoldSite | None
    shape: Architecture
    norm_C: Tensor | None  # weight of the norm that a scale would be folded into
    norm_dtype: torch.dtype | None
    options: Options

    def __post_init__(self) -> None:
        if not all(bool(torch.isfinite(x_CI).all()) for x_CI in _chunks(self.rows_TI)):
            raise CalibrationError(
                f"the inputs of {self.name} are not finite on the calibration text; nothing can "
                "be calibrated on them. Is the checkpoint intact?"
            )
        self.absmax_I = _largest(self.rows_TI)
        self.sizes = {p: _size(self.rows_TI, self.absmax_I, p) for p in POWERS}
        self.stacked_OI = torch.cat(list(self.weights.values()))
        stride = max(1, len(self.rows_TI) // SEARCH_TOKENS)
        self.few_TI = self.rows_TI[::stride][:SEARCH_TOKENS]
        stride = max(1, len(self.stacked_OI) // SEARCH_OUTPUTS)
        self.few_OI = self.stacked_OI[::stride][:SEARCH_OUTPUTS]
        self.hessian_II = self.rows_TI.T @ self.rows_TI / len(self.rows_TI)
        self.upper_II = inverse_cholesky(damped(self.hessian_II, self.options.damping))

    def size_of_rotated(self, scale_I: Tensor | None, rotated_NB: Tensor, power: float) -> Tensor:
        """Size of each channel behind a rotation, from every fourth token."""
        rows_TI = self.rows_TI[::4]
        rows_TI = rotate_inputs(rows_TI if scale_I is None else rows_TI / scale_I, rotated_NB)
        return _size(rows_TI, _largest(rows_TI), power)

    def scales(self, alpha: float) -> tuple[Tensor, Tensor]:
        """The smoothing scale at the site's source and at the group's inputs.

        What a norm's weight becomes is rounded to the dtype in which it is stored, and the scale is
        what this rounded weight makes of it, so that the fold is exact.
        """
        assert self.site is not None
        absmax_C = reduce_scale(self.site, self.shape, self.absmax_I)
        weight_C = reduce_scale(self.site, self.shape, self.stacked_OI.abs().amax(0))
        scale_C = smoothing_scale(absmax_C, weight_C, alpha)
        if self.norm_C is not None:
            assert self.norm_dtype is not None
            norm_C = self.norm_C.float()
            rounded_C = (norm_C / scale_C).to(self.norm_dtype).float()
            exact_C = norm_C / rounded_C
            scale_C = torch.where((rounded_C != 0) & exact_C.isfinite(), exact_C, 1.0)
        return scale_C, expand_scale(self.site, self.shape, scale_C)


@method(
    "flattenquant",
    paper="FlattenQuant, arXiv 2402.17985",
    options=Options,
    scope="model",
    formats=("flat",),
    needs=lambda options: frozenset({"inputs"}),
)
def solve_group(
    group: Sequence[str], block: Block, rows_TI: Tensor, options: Options, rungs: Sequence[Rung]
) -> list[Candidate]:
    """All rungs of one group.

    Args:
        group: paths of linears that share their input.
        block: weights, norms and fold sites.
        rows_TI: float32 inputs of calibration tokens.
        options: of the method.
        rungs: what to try.

    Raises:
        CalibrationError: the inputs are not finite; names the layer.
    """
    shape = replace(block.architecture, transposed=False)
    site = fold_site_of(group, shape) if options.smooth == "fold" else None
    norm = None
    if site is not None and site.source in block.weights and options.weight_scale == "tensor":
        site = None  # taking the scale up would give the source's rows scales of their own
    if site is not None and site.source not in block.weights:
        norm = block.parameters.get(f"{site.source}.weight")
        if norm is None:
            site = None  # a norm without a weight takes nothing up
    shared = _Group(
        f"{block.name}.{group[0]}", {p: block.weights[p] for p in group}, rows_TI, site, shape,
        norm, None if norm is None else norm.dtype, options,
    )  # fmt: skip
    solved: list[Candidate] = []
    for rung in rungs:
        candidate = _solve(shared, rung, solved[-1] if solved else None)
        solved.append(candidate)
    return solved


HEAD_ROWS = 4096


def solve_head(head_OI: Tensor) -> FlatWeight:
    """The head at 8 bits, to nearest, with a step for each token: no channel is made wide.

    Args:
        head_OI: in any float dtype, on any device.
    """
    limit_I = torch.full((head_OI.shape[1],), largest_digit(8), device=head_OI.device)
    digits, scales = [], []
    for part_OI in head_OI.split(HEAD_ROWS):
        part_OI = part_OI.float()
        scale_O = _row_scales(part_OI, limit_I, torch.ones_like(part_OI[0]), None)
        wide_OI = (part_OI / scale_O[:, None]).round_().clamp_(-limit_I, limit_I)
        packed = FlatWeight.pack(wide_OI, scale_O, limit_I, 8)
        digits.append(packed.digits)
        scales.append(packed.scale)
    return FlatWeight(
        torch.cat(digits, dim=1), torch.cat(scales), packed.limit, packed.source, 8,
        head_OI.shape[1],
    )  # fmt: skip


@dataclass(frozen=True)
class _Setting:
    """What is tried for a group's ranges.

    Attributes:
        alpha: of smoothing; None for none.
        power: of the mean that is a channel's size.
        spent: columns given to weights.
        block: inputs of a rotated block, 0 for no rotation.
    """

    alpha: float | None = None
    power: float = math.inf
    spent: int = 0
    block: int = 0


@dataclass
class _Trial:
    """Ranges with one setting, and the error of the output that they promise."""

    error: float
    setting: _Setting
    scale_C: Tensor | None
    scale_I: Tensor | None
    rotated_NB: Tensor | None
    limit_I: Tensor
    step: float | None
    weight_pieces_I: Tensor
    columns: int
    threshold: float

    def inputs(self, x_TI: Tensor) -> Tensor:
        """Inputs as they are quantized: smoothed and rotated."""
        if self.scale_I is not None:
            x_TI = x_TI / self.scale_I
        return x_TI if self.rotated_NB is None else rotate_inputs(x_TI, self.rotated_NB)

    def weights(self, weight_OI: Tensor) -> Tensor:
        """Weights that do to such inputs what ``weight_OI`` does to the original ones."""
        if self.scale_I is not None:
            weight_OI = weight_OI * self.scale_I
        return weight_OI if self.rotated_NB is None else rotate_inputs(weight_OI, self.rotated_NB)


def _solve(group: _Group, rung: Rung, before: Candidate | None) -> Candidate:
    options = group.options
    budget = column_budget(group.stacked_OI.shape[1], rung.growth, options.tile)
    if before is not None and before.facts["column_budget"] == budget:
        was = before.rung
        if (was.bits, was.input_bits, was.static) == (rung.bits, rung.input_bits, rung.static):
            # A few inputs: more growth is still less than a tile.
            return replace(before, rung=rung, facts=before.facts | {"rung": rung.name})
    best = _search(group, rung, budget)
    weight_OI = best.weights(group.stacked_OI)
    step = _step_tensor(best.step, weight_OI)
    linears = _row_slices(group.weights) if options.weight_scale == "tensor" else None
    most_I = best.weight_pieces_I * largest_digit(rung.bits)
    target_OI, clipped_inputs = weight_OI, 0.0
    hessian_II = None
    if rung.input_bits == 8:
        # Rounding to 8 bits leaves the Hessian as it is, but for a noise that damping covers.
        upper_II = group.upper_II if best.scale_I is None else group.upper_II * best.scale_I
        if rung.static:
            clipped_inputs = _share_clipped(group, best, step)
    else:
        hessian_II, cross_II, clipped_inputs = _seen_inputs(group, best, step)
        hessian_II = damped(hessian_II, options.damping)
        if options.compensate:
            # The weights that make the most of rounded inputs: least squares, damped likewise.
            lower_II = torch.linalg.cholesky(hessian_II.double())
            moment_IO = (weight_OI @ cross_II).T.double()
            target_OI = weight_OI + torch.cholesky_solve(moment_IO, lower_II).T.float()
        upper_II = inverse_cholesky(hessian_II)
    importance_I = upper_II.diagonal().reciprocal().square()
    scale_O = _row_scales(target_OI, most_I, importance_I, linears)
    wide_OI = round_integers_with_feedback(target_OI, upper_II, scale_O, most_I)
    if rung.bits == 4:
        if hessian_II is None:
            inverse_II = upper_II.double().inverse()
            hessian_II = (inverse_II @ inverse_II.T).float()
        scale_O = refit_scales(target_OI, hessian_II, wide_OI, scale_O, linears)
        wide_OI = descend_integers(target_OI, hessian_II, wide_OI, scale_O, most_I)
        scale_O = refit_scales(target_OI, hessian_II, wide_OI, scale_O, linears)
    clipped = target_OI.abs() > (most_I + 0.5) * scale_O[:, None]

    few_q, few_step = quantize_input(best.inputs(group.few_TI), best.limit_I, step)
    outputs_TO = (few_q.float() @ wide_OI.T) * (few_step[:, None] * scale_O)
    exact_TO = group.few_TI @ group.stacked_OI.T
    error, signal = (outputs_TO - exact_TO).square().sum(), exact_TO.square().sum()

    packed = {}
    for path, rows in zip(group.weights, _row_slices(group.weights), strict=True):
        packed[path] = FlatWeight.pack(
            wide_OI[rows], scale_O[rows], best.limit_I, rung.bits, step,
            rotated_NB=best.rotated_NB,
        )  # fmt: skip
    narrow = largest_digit(rung.input_bits)
    facts = {
        "rung": rung.name,
        "bits": rung.bits,
        "input_bits": rung.input_bits,
        "columns": best.columns,
        "column_budget": budget,
        "growth": best.columns / len(best.limit_I) - 1,
        "alpha": best.setting.alpha,
        "rotated": best.setting.block,
        "threshold": best.threshold,
        "wide_channels": int((best.limit_I > narrow).sum()),
        "wide_weights": int((best.weight_pieces_I > 1).sum()),
        "clipped_inputs": clipped_inputs,
        "clipped_weights": float(clipped.float().mean()),
        "output_error": float(error / signal.clamp_min(1e-30)),
    }
    return Candidate(rung, packed, best.scale_I, best.scale_C, group.site, facts)


def _search(group: _Group, rung: Rung, budget: int) -> _Trial:
    """The setting with the least error, one part of it after the other."""
    options, inputs = group.options, group.stacked_OI.shape[1]
    best = _try(group, rung, budget, _Setting())

    def improve(settings: Iterable[_Setting]) -> None:
        nonlocal best
        for setting in settings:
            if setting != best.setting:
                trial = _try(group, rung, budget, setting)
                best = trial if trial.error < best.error else best

    if group.site is not None:
        improve([_Setting(alpha) for alpha in ALPHAS])
    if budget > inputs:
        improve([replace(best.setting, power=p) for p in POWERS])
    if options.rotate == "hadamard" and rung.input_bits == 4:
        blocks = [b for b in ROTATIONS if 4 * b <= inputs]
        alphas = dict.fromkeys((None, best.setting.alpha))
        plain, best = best, replace(best, error=best.error * ROTATION_GAIN)
        improve([_Setting(a, POWERS[1], block=b) for a in alphas for b in blocks])
        best = best if best.setting.block else plain
    spare = [int((budget - inputs) * share) for share in (0.25, 0.5)]
    improve([replace(best.setting, spent=s) for s in spare if s])
    return best


def _try(group: _Group, rung: Rung, budget: int, setting: _Setting) -> _Trial:
    """Ranges of inputs and weights with one setting, and the error that they promise."""
    options = group.options
    scale_C = scale_I = rotated_NB = None
    size_I = group.sizes[setting.power]
    importance_I = group.upper_II.diagonal().reciprocal().square()
    if setting.alpha is not None:
        scale_C, scale_I = group.scales(setting.alpha)
        size_I = size_I / scale_I
        importance_I = importance_I / scale_I.square()
    if setting.block:
        rotated_NB = blocks_to_rotate(size_I, setting.block)
        size_I = group.size_of_rotated(scale_I, rotated_NB, setting.power)
        # Every output of a rotation is made of all inputs of its block.
        index = rotated_NB.long()
        mean_N1 = importance_I[index].mean(1, keepdim=True)
        importance_I = importance_I.index_put((index,), mean_N1.expand(index.shape))
    trial = _Trial(
        math.inf, setting, scale_C, scale_I, rotated_NB, size_I, None, size_I, 0, 0.0
    )  # fmt: skip
    few_TI, few_OI = trial.inputs(group.few_TI), trial.weights(group.few_OI)
    linears = [slice(None)] if options.weight_scale == "tensor" else None
    pieces_I = _weight_pieces(few_OI, importance_I, rung.bits, setting.spent, linears)
    flat = flatten(size_I, rung.input_bits, budget, options.scheme, pieces_I)
    assert flat is not None  # at most half of what there is to spend goes to weights
    most = largest_digit(rung.input_bits)
    steps: tuple[float | None, ...] = (None,)
    if rung.static:
        base = flat.threshold / most if flat.threshold > 0 else 1.0
        steps = tuple(base * share for share in STATIC_RANGES)
    inputs_error, step = math.inf, None
    for candidate in steps:
        q_TI, step_T = quantize_input(few_TI, flat.limit_I, _step_tensor(candidate, few_TI))
        rounding_TI = q_TI.float() * step_T[:, None] - few_TI
        error = float((rounding_TI @ few_OI.T).square().sum(1).mean())
        if error < inputs_error:
            inputs_error, step = error, candidate
    most_I = pieces_I * largest_digit(rung.bits)
    scale_O = _row_scales(few_OI, most_I, importance_I, linears)
    weights_error = float((_rounding(few_OI, scale_O, most_I).square() @ importance_I).sum())
    return replace(
        trial, error=inputs_error + weights_error, limit_I=flat.limit_I, step=step,
        weight_pieces_I=pieces_I, columns=flat.columns,
        threshold=flat.threshold if step is None else step * most,
    )  # fmt: skip


def _seen_inputs(group: _Group, best: _Trial, step: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """Moments of the quantized inputs X^: ``X^^T X^`` and ``(X - X^)^T X^`` a token, and the share
    of inputs that were clipped."""
    rows_TI = group.rows_TI
    inputs = rows_TI.shape[1]
    hessian_II, cross_II = rows_TI.new_zeros(2, inputs, inputs)
    seen_TI = torch.empty_like(rows_TI[:_CHUNK_TOKENS])
    clipped = 0
    for part_TI in rows_TI.split(_CHUNK_TOKENS):
        seen = seen_TI[: len(part_TI)]
        for x_CI, seen_CI in zip(_chunks(part_TI), _chunks(seen), strict=True):
            x_CI = best.inputs(x_CI)
            q_CI, step_C = quantize_input(x_CI, best.limit_I, step)
            torch.mul(q_CI, step_C[:, None], out=seen_CI)
            if step is not None:
                clipped += _clipped(x_CI, best.limit_I, step_C)
        hessian_II.addmm_(seen.T, seen)
        cross_II.addmm_(part_TI.T, seen)
    # What smoothing and rotation do to the inputs, done to the moment instead.
    cross_II = best.inputs(cross_II.T).T - hessian_II
    tokens = max(1, len(rows_TI))
    return hessian_II / tokens, cross_II / tokens, clipped / max(1, rows_TI.numel())


def _share_clipped(group: _Group, best: _Trial, step: Tensor | None) -> float:
    clipped = 0
    for x_CI in _chunks(group.rows_TI):
        x_CI = best.inputs(x_CI)
        step_C = quantize_input(x_CI, best.limit_I, step)[1]
        clipped += _clipped(x_CI, best.limit_I, step_C)
    return clipped / max(1, group.rows_TI.numel())


def _clipped(x_TI: Tensor, limit_I: Tensor, step_T: Tensor) -> int:
    return int((x_TI.abs() > (limit_I + 0.5) * step_T[:, None]).sum())


def _step_tensor(step: float | None, like: Tensor) -> Tensor | None:
    return None if step is None else torch.tensor([step], dtype=torch.float32, device=like.device)


_CHUNK_TOKENS = 2048


def _chunks(x_TI: Tensor) -> tuple[Tensor, ...]:
    """Parts of the rows, as many at a time as `CHUNK_BYTES` hold."""
    return x_TI.split(max(1, CHUNK_BYTES // max(1, 4 * x_TI.shape[1])))


def _largest(rows_TI: Tensor) -> Tensor:
    """Largest absolute value of each channel."""
    largest_I = rows_TI.new_zeros(rows_TI.shape[1])
    for x_CI in _chunks(rows_TI):
        low_I, high_I = x_CI.aminmax(dim=0)
        largest_I = torch.maximum(largest_I, torch.maximum(-low_I, high_I))
    return largest_I


def _size(rows_TI: Tensor, largest_I: Tensor, power: float) -> Tensor:
    """Power mean of each channel; powers are 4, 8 or infinity."""
    if math.isinf(power):
        return largest_I
    total_I = torch.zeros_like(largest_I)
    for x_CI in _chunks(rows_TI):
        part = x_CI / largest_I.clamp_min(1e-30)
        for _ in range(int(math.log2(power))):
            part.square_()
        total_I += part.sum(0)
    return largest_I * (total_I / max(1, len(rows_TI))) ** (1 / power)


def _row_slices(weights: Mapping[str, Tensor]) -> list[slice]:
    """The rows of each linear among those of the whole group."""
    ends = list(itertools.accumulate(len(w) for w in weights.values()))
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _weight_pieces(
    weight_OI: Tensor, importance_I: Tensor, bits: int, spent: int, linears: list[slice] | None
) -> Tensor:
    """Two digits for the ``spent`` channels that clipping would cost most, int64 ``[in]``."""
    pieces_I = torch.ones(weight_OI.shape[1], dtype=torch.int64, device=weight_OI.device)
    if not spent:
        return pieces_I
    most_I = pieces_I * largest_digit(bits)
    scale_O = _row_scales(weight_OI, most_I, importance_I, linears)
    beyond_OI = (weight_OI.abs() - scale_O[:, None] * (most_I + 0.5)).clamp_min(0)
    # Also what a coarser step costs the others, for the channels that set it.
    loss_I = beyond_OI.square().sum(0) * importance_I
    peak_I = (weight_OI.abs() / weight_OI.abs().amax(1, keepdim=True).clamp_min(1e-30)).amax(0)
    worst = torch.argsort(loss_I + 1e-12 * peak_I, descending=True, stable=True)[:spent]
    pieces_I[worst] = 2
    return pieces_I


def _row_scales(
    weight_OI: Tensor, most_I: Tensor, importance_I: Tensor, linears: list[slice] | None
) -> Tensor:
    """For every row the scale with the least weighted rounding error, float32 ``[out]``.

    Args:
        linears: rows that share one scale; None gives each row its own.
    """
    # Relative to the range of its channel, so a wide channel does not set the scale.
    largest_O = _over_linears((weight_OI.abs() / most_I).amax(1), linears, torch.amax)
    best_O = torch.full_like(largest_O, torch.inf)
    scale_O = torch.ones_like(largest_O)
    for share in WEIGHT_RANGES:
        trial_O = torch.where(largest_O > 0, largest_O * share, 1.0)
        error_O = _rounding(weight_OI, trial_O, most_I).square() @ importance_I
        error_O = _over_linears(error_O, linears, torch.sum)
        better_O = error_O < best_O
        best_O = torch.where(better_O, error_O, best_O)
        scale_O = torch.where(better_O, trial_O, scale_O)
    return scale_O


def _over_linears(
    values_O: Tensor, linears: list[slice] | None, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Rows of one linear get what ``reduce`` makes of all of them; as they are for None."""
    if linears is None:
        return values_O
    return torch.cat([reduce(values_O[r]).expand(len(values_O[r])) for r in linears])


def _rounding(weight_OI: Tensor, scale_O: Tensor, most_I: Tensor) -> Tensor:
    integers_OI = (weight_OI / scale_O[:, None]).round_().clamp_(-most_I, most_I)
    return integers_OI.mul_(scale_O[:, None]).sub_(weight_OI)
