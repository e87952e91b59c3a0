"""Solvers against slow float64 references, and the properties that they promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.solvers import bcq, ranges
from lutra.solvers.gptq_loop import (
    Solution,
    add_plane,
    damped,
    descend,
    descend_codes,
    inverse_cholesky,
    output_error,
    quantize_with_feedback,
    refit_levels,
    round_to_nearest,
)
from lutra.solvers.levels import FreeLevels, Levels, UniformLevels
from lutra.solvers.parallel import map_layers

SHAPES = [(5, 33, 32), (7, 96, 32), (3, 70, 64), (4, 31, 64), (1, 64, 64), (6, 100, 128)]
"""Out features, in features, group size: dividing or not, one row, one group, less than a group."""


def _problem(out: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, and H of correlated inputs on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inputs, generator=generator)
    weight = 0.02 * weight * weight.abs().sqrt()
    x = torch.randn(4 * inputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = (x + x @ mix) * torch.randn(inputs, generator=generator).mul(0.8).exp()
    return weight, x.T @ x / len(x)


def _loss(weight: Tensor, solution: Solution, hessian: Tensor) -> float:
    error = (weight - solution.decode()).double()
    return float(((error @ hessian.double()) * error).sum())


def _find(bits: int, kind: str):
    def find(weight: Tensor, importance: Tensor) -> Levels:
        if kind == "ubcq":
            return ranges.min_max(weight, bits)
        if kind == "int":
            return ranges.with_integer_zero(ranges.min_max(weight, bits))
        return FreeLevels(*bcq.alternating(weight, bits, importance.expand_as(weight)))

    return find


DEGENERATE = {
    "constant": torch.full((2, 32), 0.75),
    "zero": torch.zeros(2, 32),
    "one outlier": torch.cat([torch.full((2, 1), 1e6), 1e-2 * torch.ones(2, 31)], 1),
    "two values": torch.tensor([1.0, -2.0]).repeat(2, 16),
    "tiny": 1e-30 * torch.randn(2, 32, generator=torch.Generator().manual_seed(1)),
    "positive": 5 + torch.rand(2, 32, generator=torch.Generator().manual_seed(2)),
    "one weight": torch.tensor([[0.3], [-0.4]]),
}


# ---- binary coding


@pytest.mark.parametrize("planes", range(1, 9))
def test_nearest_codes_are_those_of_brute_force(planes):
    torch.manual_seed(planes)
    weight = torch.randn(9, 37)
    alpha, offset = torch.randn(9, planes), torch.randn(9)
    levels = bcq.levels_of(alpha, offset)
    found = levels.gather(1, bcq.nearest_codes(weight, alpha, offset))
    best = (weight[..., None] - levels[:, None]).abs().amin(-1)
    assert torch.allclose((weight - found).abs(), best, atol=1e-6)
    code, value = FreeLevels(alpha, offset).nearest(weight)
    assert torch.equal(value, found) and torch.equal(levels.gather(1, code), value)


def test_levels_of_are_sums_of_signs():
    alpha, offset = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for code, signs in enumerate(itertools.product((-1.0, 1.0), repeat=3)):
        expected = offset + alpha @ torch.tensor(signs, dtype=torch.float64)
        assert torch.allclose(bcq.levels_of(alpha, offset)[:, code], expected)


@pytest.mark.parametrize("planes", [1, 2, 3, 5])
def test_scales_are_weighted_least_squares(planes):
    torch.manual_seed(planes)
    weight, importance = torch.randn(6, 41), torch.rand(6, 41) + 0.1
    signs = torch.randint(0, 2, (6, 41, planes)) * 2.0 - 1
    alpha, offset = bcq.fit_scales(weight, signs, importance, ridge=1e-9)
    for row in range(6):
        root = importance[row].double().sqrt()[:, None]
        basis = torch.cat([signs[row], torch.ones(41, 1)], 1).double()
        expected = torch.linalg.lstsq(root * basis, root * weight[row].double()[:, None]).solution
        found = torch.cat([alpha[row], offset[row, None]]).double()
        assert torch.allclose(found, expected[:, 0], atol=1e-4)


def _bcq_loss(weight: Tensor, alpha: Tensor, offset: Tensor, importance: Tensor) -> Tensor:
    levels = bcq.levels_of(alpha.double(), offset.double())
    error = (weight.double()[..., None] - levels[:, None]).abs().amin(-1)
    return (importance.double() * error.square()).sum(-1)


@pytest.mark.parametrize("planes", [1, 2, 3, 4, 8])
def test_alternating_never_makes_it_worse(planes):
    torch.manual_seed(planes)
    weight, importance = torch.randn(16, 45), torch.rand(16, 45)
    before = torch.full((16,), torch.inf, dtype=torch.float64)
    for rounds in (0, 1, 2, 5, 15):
        found = bcq.alternating(weight, planes, importance, rounds, (bcq.greedy,))
        loss = _bcq_loss(weight, *found, importance)
        assert (loss <= before * (1 + 1e-5) + 1e-12).all()
        before = loss
    both = _bcq_loss(weight, *bcq.alternating(weight, planes, importance), importance)
    assert (both <= before * (1 + 1e-5) + 1e-12).all()


def test_greedy_is_the_papers():
    """Each plane is the sign of what is left, and its scale the mean magnitude of that."""
    torch.manual_seed(0)
    weight = torch.randn(3, 50)
    alpha, offset = bcq.greedy(weight, 4, torch.ones_like(weight))
    for row in range(3):
        left = weight[row].double() - weight[row].double().mean()
        for plane in range(4):
            scale = left.abs().mean()
            assert abs(float(alpha[row, plane]) - float(scale)) < 1e-5
            left = left - torch.where(left >= 0, scale, -scale)


def test_two_values_need_one_plane():
    weight = torch.tensor([1.0, -2.0]).repeat(3, 16)
    alpha, offset = bcq.alternating(weight, 1)
    assert torch.allclose(alpha, torch.tensor(1.5)) and torch.allclose(offset, torch.tensor(-0.5))


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("planes", [1, 2, 4, 8])
def test_degenerate_groups_of_binary_codes(name, planes):
    weight = DEGENERATE[name]
    for solver in (0, 1, 15):
        alpha, offset = bcq.alternating(weight, planes, rounds=solver)
        assert alpha.isfinite().all() and offset.isfinite().all() and (alpha >= 0).all()
        loss = _bcq_loss(weight, alpha, offset, torch.ones_like(weight))
        mean = (weight.double() - weight.double().mean(1, keepdim=True)).square().sum(1)
        assert (loss <= mean + 1e-10 * weight.double().square().sum(1)).all()


def test_weights_of_no_importance_do_not_break_the_fit():
    weight = torch.randn(4, 32)
    alpha, offset = bcq.alternating(weight, 3, torch.zeros_like(weight))
    assert alpha.isfinite().all() and offset.isfinite().all()


# ---- uniform grids


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", DEGENERATE)
def test_grids_hold_their_weights(name, bits):
    """Between the ends of the grid no weight is further than half a step from its level."""
    weight = DEGENERATE[name]
    for levels in (
        ranges.min_max(weight, bits),
        ranges.with_integer_zero(ranges.min_max(weight, bits)),
    ):
        code, value = levels.nearest(weight)
        assert value.isfinite().all() and ((code >= 0) & (code < 2**bits)).all()
        assert torch.allclose(levels.decode(code), value, rtol=1e-5, atol=0)
        reach = weight.abs().amax(1, keepdim=True)
        # One bit has its levels at the mean deviation, inside the extremes.
        bound = levels.step_N[:, None] * 0.5 if bits > 1 else reach
        if bits > 1:
            bound = bound * 2  # an integer zero point moves the grid by up to half a step
        assert ((weight - value).abs() <= bound + 1e-6 * reach).all()


def test_integer_zero_points_are_integers_and_in_range():
    torch.manual_seed(0)
    weight = torch.randn(64, 32) + 3 * torch.randn(64, 1)  # many groups do not contain zero
    for bits in (1, 2, 4, 8):
        levels = ranges.with_integer_zero(ranges.min_max(weight, bits))
        zero_point = levels.center - levels.offset_N / levels.step_N
        assert torch.allclose(zero_point, zero_point.round(), atol=1e-3)
        assert (zero_point.round() >= 0).all() and (zero_point.round() < 2**bits).all()


def test_clip_search_is_never_worse_than_min_max():
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((20, 64))
    importance = torch.rand(20, 64)
    for bits in (1, 2, 3, 4):
        losses = [
            (importance * (levels.nearest(weight)[1] - weight).square()).sum(1)
            for levels in (
                ranges.min_max(weight, bits),
                ranges.search_clip(weight, bits, importance),
            )
        ]
        assert (losses[1] <= losses[0]).all()
        assert losses[1].sum() < (0.95 if bits > 1 else 1) * losses[0].sum()


# ---- error feedback


def _naive_gptq(weight: Tensor, hessian: Tensor, group: int, find) -> Tensor:
    """Algorithm 1 by its definition: the inverse of what is left of H, anew for every column."""
    weight, hessian = weight.double().clone(), hessian.double()
    quantized = torch.empty_like(weight)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % group == 0:
            upper = inverse_cholesky(hessian)  # importance only steers the levels
            stop = min(j + group, weight.shape[1])
            importance = upper.diagonal()[j:stop].reciprocal().square()
            levels = find(weight[:, j:stop].float(), importance.float())
        value = levels.nearest(weight[:, j, None].float())[1][:, 0].double()
        quantized[:, j] = value
        error = (weight[:, j] - value) / inverse[0, 0]
        weight[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
    return quantized


@pytest.mark.parametrize("kind", ["ubcq", "int", "bcq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_feedback_equals_the_definition(shape, kind):
    out, inputs, group = shape
    weight, hessian = _problem(out, inputs)
    find = _find(3, kind)
    solution = quantize_with_feedback(weight, hessian, group, find, damping=0.01)
    expected = _naive_gptq(weight, damped(hessian, 0.01), group, find).float()
    assert solution.codes_OI.shape == weight.shape
    assert len(solution.levels) == -(-inputs // group)
    # A weight that lies between two levels may fall to either side; then its row differs after it.
    close = torch.isclose(solution.decode(), expected, rtol=1e-3, atol=1e-5)
    assert close.float().mean() > 0.97
    found, naive = (output_error(weight, dense, hessian) for dense in (solution.decode(), expected))
    assert abs(found - naive) <= 0.02 * naive


def test_feedback_beats_rounding():
    for seed in range(3):
        weight, hessian = _problem(32, 128, seed)
        for bits in (2, 3, 4):
            rounded = round_to_nearest(weight, 64, _find(bits, "ubcq"))
            fed = quantize_with_feedback(weight, hessian, 64, _find(bits, "ubcq"))
            assert _loss(weight, fed, hessian) < 0.95 * _loss(weight, rounded, hessian)


@pytest.mark.parametrize("out", [1, 4])
def test_feedback_does_not_change_its_arguments(out):
    weight, hessian = _problem(out, 40)
    before = weight.clone(), hessian.clone()
    solution = quantize_with_feedback(weight, hessian, 32, _find(3, "bcq"))
    descend(weight, hessian, solution, 2)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_hessians(rank):
    weight, _ = _problem(6, 64)
    x = torch.randn(max(rank, 1), 64) * (rank > 0)
    hessian = x.T @ x
    for kind in ("ubcq", "bcq"):
        solution = quantize_with_feedback(weight, hessian, 32, _find(3, kind), damping=0.0)
        better = descend(weight, hessian, solution, 2)
        for found in (solution, better):
            assert found.decode().isfinite().all()
            assert (weight - found.decode()).abs().max() < 20 * weight.abs().max()


def test_dead_inputs_are_rounded_and_feed_nothing_back():
    weight, hessian = _problem(6, 64)
    hessian[10:20], hessian[:, 10:20] = 0, 0
    find = _find(4, "ubcq")
    alive = [i for i in range(64) if not 10 <= i < 20]
    solution = quantize_with_feedback(weight, hessian, 64, find)
    dead = solution.levels[0].nearest(weight[:, 10:20])[1]
    assert torch.allclose(solution.decode()[:, 10:20], dead)
    other = weight.clone()
    other[:, 10:20] = weight[:, 10:20].flip(0).clamp(weight.amin(), weight.amax()) * 0.1
    # Same range of every row, so the levels stay and only the dead weights differ.
    kept = quantize_with_feedback(other, hessian, 64, lambda *_: solution.levels[0])
    assert torch.equal(kept.codes_OI[:, alive], solution.codes_OI[:, alive])


def test_hessian_that_is_not_finite_is_an_error():
    """Damping would be raised for ever."""
    with pytest.raises(LutraError, match="not finite"):
        inverse_cholesky(torch.full((4, 4), torch.inf))
    with pytest.raises(LutraError, match="not finite"):
        inverse_cholesky(torch.eye(4) * torch.nan)


def test_inverse_cholesky_is_what_it_says():
    _, hessian = _problem(1, 50)
    upper = inverse_cholesky(damped(hessian, 0.01)).double()
    assert torch.equal(upper, upper.triu())
    inverse = torch.linalg.inv(damped(hessian, 0.01).double())
    assert torch.allclose(upper.T @ upper, inverse, rtol=1e-4, atol=1e-5 * inverse.abs().max())


# ---- descent


@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_refit_is_least_squares(shape, kind, monkeypatch):
    out, inputs, group = shape
    weight, hessian = _problem(out, inputs)
    hessian = damped(hessian, 0.05)
    solution = round_to_nearest(weight, group, _find(2, kind))
    two_rows = 2 * 8 * (len(solution.levels) * (3 if kind == "bcq" else 2)) ** 2
    monkeypatch.setattr("lutra.solvers.gptq_loop.REFIT_BYTES", two_rows)
    refitted = refit_levels(weight, hessian, solution)
    assert torch.equal(refitted.codes_OI, solution.codes_OI)
    root = torch.linalg.cholesky(hessian.double()).T
    signs = bcq.plane_signs(2).double() if kind == "bcq" else torch.arange(4.0).double()[:, None]
    for row in range(out):
        columns = []
        for g in range(len(solution.levels)):
            inside = (torch.arange(inputs) // group == g).double()
            per_weight = signs[solution.codes_OI[row]]
            columns += [inside[:, None] * per_weight, inside[:, None]]
        basis = root @ torch.cat(columns, 1)
        target = root @ weight[row].double()
        best = torch.linalg.lstsq(basis, target[:, None], driver="gelsd").solution
        least = float((basis @ best - target[:, None]).square().sum())
        error = root @ (weight[row] - refitted.decode()[row]).double()
        assert float(error.square().sum()) <= least * (1 + 1e-3) + 1e-9 * float(
            target.square().sum()
        )


@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_descent_never_raises_the_loss(shape, kind, bits):
    out, inputs, group = shape
    weight, hessian = _problem(out, inputs, seed=bits)
    matrix = damped(hessian, 0.01)
    solution = quantize_with_feedback(weight, hessian, group, _find(bits, kind))
    before = _loss(weight, solution, matrix)
    for rounds in (0, 1, 2, 4):
        loss = _loss(weight, descend(weight, hessian, solution, rounds), matrix)
        assert loss <= before * (1 + 1e-4)
        before = loss
    codes = descend_codes(weight, matrix, solution)
    assert _loss(weight, codes, matrix) <= _loss(weight, solution, matrix) * (1 + 1e-5)


def test_descent_finds_the_optimum_of_a_small_problem():
    """Two inputs, two bits: all 16 pairs of codes can be tried."""
    torch.manual_seed(3)
    hessian = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    weight = torch.randn(20, 2)
    levels = ranges.min_max(weight, 2)
    start = Solution(torch.zeros(20, 2, dtype=torch.int64), [levels], 32)
    found = start
    for _ in range(6):
        found = descend_codes(weight, hessian, found)
    losses = []
    for pair in itertools.product(range(4), repeat=2):
        error = weight - levels.decode(torch.tensor(pair).expand(20, 2))
        losses.append(((error @ hessian) * error).sum(1))
    error = weight - found.decode()
    gap = ((error @ hessian) * error).sum(1) - torch.stack(losses).amin(0)
    # Coordinate descent can stop at a point that no single change improves.
    assert (gap >= -1e-6).all() and (gap < 1e-6).float().mean() > 0.8


@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_more_plane_keeps_the_others(shape, kind):
    out, inputs, group = shape
    weight, hessian = _problem(out, inputs)
    matrix = damped(hessian, 0.01)
    solution = quantize_with_feedback(weight, hessian, group, _find(2, kind))
    before = _loss(weight, solution, matrix)
    for bits in (3, 4, 5):
        finer = add_plane(weight, matrix, solution)
        assert torch.equal(finer.codes_OI >> 1, solution.codes_OI)
        assert finer.codes_OI.max() < 2**bits
        loss = _loss(weight, finer, matrix)
        assert loss < before
        solution, before = finer, loss


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
def test_degenerate_matrices_through_the_whole_solver(name, kind):
    weight = DEGENERATE[name]
    weight = weight.repeat(1, 3)[:, : 3 * weight.shape[1] - 1] if weight.shape[1] > 1 else weight
    inputs = weight.shape[1]
    _, hessian = _problem(1, inputs)
    solution = quantize_with_feedback(weight, hessian, 32, _find(3, kind))
    solution = descend(weight, hessian, solution, 3)
    finer = add_plane(weight, damped(hessian, 0.01), solution)
    for found in (solution, finer):
        dense = found.decode()
        assert dense.isfinite().all()
        assert output_error(weight, dense, hessian) < (0.05 if name != "one outlier" else 1e-3)
    if name == "zero":
        assert (solution.decode() == 0).all()
    if name == "constant":
        assert torch.allclose(solution.decode(), weight, rtol=1e-4)


def test_constant_groups_in_wide_matrices():
    """Signs and ones are the same column there; the refit must not blow up on rounding."""
    weight, hessian = _problem(16, 768)
    weight[:, 128:384] = 0.02
    weight[3] = 0
    solution = quantize_with_feedback(weight, hessian, 128, _find(2, "bcq"))
    solution = descend(weight, hessian, solution, 2)
    scale = torch.stack([lv.alpha_NQ.abs().amax() for lv in solution.levels])
    assert scale.max() < 20 * weight.abs().max()
    assert (solution.decode()[3].abs() < 1e-4).all()


# ---- several matrices at a time


def test_matrices_keep_their_order_and_errors_come_through():
    weights = {name: torch.randn(size, 4) for name, size in (("a", 1), ("b", 3), ("c", 2))}
    threads = torch.get_num_threads()
    assert list(map_layers(lambda _, w: len(w), weights).items()) == [("a", 1), ("b", 3), ("c", 2)]

    def fail(path: str, _: Tensor) -> None:
        raise ValueError(path)

    with pytest.raises(ValueError, match="a"):
        map_layers(fail, weights)
    assert torch.get_num_threads() == threads


def test_uniform_levels_of_a_constant_group():
    levels = UniformLevels(torch.zeros(1), torch.tensor([0.5]), 3)
    code, value = levels.nearest(torch.tensor([[0.5, 0.5]]))
    assert torch.equal(value, torch.tensor([[0.5, 0.5]]))
    assert torch.equal(levels.decode(code), value)
