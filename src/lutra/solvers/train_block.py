"""Train what a block stores (scales, offsets and codes) on the output of the whole block.

    minimise  || block(x_original; W) - block(x; W^) ||^2

x is what the already quantized blocks before this one produce, so the block also learns to undo
their errors. Codes are trained through a rounding variable, as in AdaRound (arXiv 2004.10568) and
AutoRound (arXiv 2309.05516): each weight has a position u on the axis of codes, its level is that
of round(u), and the gradient passes the rounding unchanged (straight-through). Where we differ: u
starts at the codes that error feedback and descent have found, not at plain rounding; scales and
offsets are trained themselves, not as a clipping of min-max; the optimiser is Adam with a cosine
schedule; and the best state on a fixed set of samples is kept, so training can not make the block
worse there.

Shape suffixes: O out features, I in features, G groups, P scales of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lutra.formats.bitplanes import expand_groups
from lutra.solvers.bcq import plane_signs
from lutra.solvers.gptq_loop import Solution
from lutra.solvers.levels import FreeLevels, Levels, UniformLevels

if TYPE_CHECKING:
    from lutra.methods import BlockRunner


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast.

    Attributes:
        steps: optimiser steps.
        batch: samples in a step.
        learning_rate: of the rounding variables, in codes per step.
        scale_learning_rate: of scales and offsets, relative to the scale.
        seed: for the order of samples.
    """

    steps: int
    batch: int
    learning_rate: float
    scale_learning_rate: float
    seed: int


class TrainableWeight(nn.Module):
    """A quantized weight whose scales, offsets and codes are parameters.

    The codes follow a position u on the axis of sorted levels: level round(u) is used, and the
    gradient of u is the distance between neighbouring levels there.

    Args:
        solution: where to start.
        weight_OI: the weights that are represented; says on which side of its level each one lies.
        train_codes: whether the codes may change, or only scales and offsets.
    """

    def __init__(self, solution: Solution, weight_OI: Tensor, train_codes: bool = True) -> None:
        super().__init__()
        first = solution.levels[0]
        self.group_size, self.in_features = solution.group_size, weight_OI.shape[1]
        self.uniform = isinstance(first, UniformLevels)
        self.bits = first.bits
        offset_OG = torch.stack([lv.offset_N for lv in solution.levels], 1)
        scale_POG = torch.stack([lv.scales_PN for lv in solution.levels], 2)
        # Trained relative to a typical scale, so that one learning rate suits every matrix.
        self.unit = float(scale_POG[0].abs().mean().clamp_min(1e-12))
        self.scale = nn.Parameter(scale_POG / self.unit)
        self.offset = nn.Parameter(offset_OG / self.unit)
        with torch.no_grad():
            rank_OI, spacing_OI = self._ranks(solution.codes_OI)
            side_OI = (weight_OI - solution.decode()) / spacing_OI
            position_OI = rank_OI + side_OI.nan_to_num().clamp(-0.45, 0.45)
        self.position = nn.Parameter(position_OI, requires_grad=train_codes)

    def _levels(self) -> tuple[Tensor, Tensor]:
        """Sorted levels ``[O, G, L]`` and the code of each, for free scales."""
        signs_LQ = plane_signs(self.bits, self.scale.device)
        levels_OGL = torch.einsum("qog,lq->ogl", self.scale, signs_LQ) + self.offset[..., None]
        sorted_OGL, code_OGL = levels_OGL.sort(dim=-1)
        return sorted_OGL, code_OGL

    def _ranks(self, codes_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Rank of each code among its group's sorted levels, and the spacing there (in weights)."""
        if self.uniform:
            rank_OI = codes_OI
            spacing_OI = expand_groups(self.scale[0], self.group_size, self.in_features)
        else:
            sorted_OGL, code_OGL = self._levels()
            rank_OI = self._per_weight(code_OGL.argsort(dim=-1), codes_OI)
            spacing_OI = self._per_weight(_spacing(sorted_OGL), rank_OI)
        return rank_OI.to(self.scale.dtype), spacing_OI * self.unit

    def _per_weight(self, table_OGL: Tensor, index_OI: Tensor) -> Tensor:
        """Entry ``table[o, g(i), index[o, i]]`` for every weight."""
        levels = table_OGL.shape[-1]
        group_I = torch.arange(self.in_features, device=index_OI.device) // self.group_size
        return table_OGL.flatten(1).gather(1, group_I * levels + index_OI)

    def forward(self) -> Tensor:
        """The dense weight ``[out, in]``."""
        last = 2**self.bits - 1
        inside_OI = self.position.clamp(0, last)
        rank_OI = inside_OI.round().detach()
        slope_OI = inside_OI - inside_OI.detach()  # zero, with the gradient of the position
        offset_OI = expand_groups(self.offset, self.group_size, self.in_features)
        if self.uniform:
            step_OI = expand_groups(self.scale[0], self.group_size, self.in_features)
            weight_OI = offset_OI + step_OI * (rank_OI - last / 2) + step_OI.detach() * slope_OI
        else:
            sorted_OGL, _ = self._levels()
            index_OI = rank_OI.to(torch.int64)
            spacing_OI = self._per_weight(_spacing(sorted_OGL.detach()), index_OI)
            weight_OI = self._per_weight(sorted_OGL, index_OI) + spacing_OI * slope_OI
        return weight_OI * self.unit

    @torch.no_grad()
    def solution(self) -> Solution:
        """Codes and levels as they are now."""
        rank_OI = self.position.clamp(0, 2**self.bits - 1).round().to(torch.int64)
        levels: list[Levels] = []
        scale_POG, offset_OG = self.scale * self.unit, self.offset * self.unit
        for g in range(offset_OG.shape[1]):
            offset_O = offset_OG[:, g].contiguous()
            if self.uniform:
                levels.append(UniformLevels(scale_POG[0, :, g].contiguous(), offset_O, self.bits))
            else:
                levels.append(FreeLevels(scale_POG[:, :, g].T.contiguous(), offset_O))
        codes_OI = rank_OI if self.uniform else self._per_weight(self._levels()[1], rank_OI)
        return Solution(codes_OI, levels, self.group_size)


def _spacing(sorted_OGL: Tensor) -> Tensor:
    """Mean distance from each level to its neighbours, positive, ``[O, G, L]``."""
    gap = sorted_OGL.diff(dim=-1)
    left = torch.cat([gap[..., :1], gap], dim=-1)
    right = torch.cat([gap, gap[..., -1:]], dim=-1)
    return ((left + right) / 2).clamp_min(1e-12)


def train_block(
    weights: Mapping[str, Tensor],
    solutions: Mapping[str, Solution],
    runner: BlockRunner,
    options: TrainingOptions,
    train_codes: bool = True,
) -> tuple[dict[str, Solution], dict[str, Any]]:
    """Train all weights of a block together.

    Args:
        weights: original weights by path.
        solutions: where to start, by path.
        runner: runs the block and knows the target.
        options: how long and how fast.
        train_codes: whether codes may change, or only scales and offsets.

    Returns:
        Solutions by path, and notes: the mean squared error on held-out samples relative to the
        target's mean square, before and after.
    """
    trainable = {
        path: TrainableWeight(solution, weights[path], train_codes)
        for path, solution in solutions.items()
    }
    positions = [t.position for t in trainable.values() if t.position.requires_grad]
    scales = [p for t in trainable.values() for p in (t.scale, t.offset)]
    optimizer = torch.optim.Adam(
        [
            {"params": positions, "lr": options.learning_rate},
            {"params": scales, "lr": options.scale_learning_rate},
        ],
        betas=(0.9, 0.95),
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(options.seed)
    held_out = torch.arange(min(options.batch, runner.samples))
    rest = torch.arange(len(held_out), runner.samples)
    pool = rest if len(rest) else held_out

    def loss_of(samples: Tensor) -> tuple[Tensor, Tensor]:
        target = runner.target(samples).float()
        dense = {f"{path}.weight": t() for path, t in trainable.items()}
        output = runner.run(dense, samples).float()
        return (output - target).square().mean(), target.square().mean()

    def check() -> float:
        with torch.no_grad():
            loss, power = loss_of(held_out)
        return float(loss / power)

    def state() -> dict[str, dict[str, Tensor]]:
        return {
            path: {k: v.detach().clone() for k, v in t.state_dict().items()}
            for path, t in trainable.items()
        }

    before = best = check()
    best_state = state()
    every = max(1, options.steps // 4)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(options.steps):
        while len(order) < min(options.batch, len(pool)):
            order = torch.cat([order, pool[torch.randperm(len(pool), generator=generator)]])
        samples, order = order[: options.batch], order[options.batch :]
        progress = step / options.steps
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
        loss, power = loss_of(samples)
        optimizer.zero_grad(set_to_none=True)
        (loss / power.clamp_min(1e-30)).backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == options.steps:
            now = check()
            if now < best:  # false for NaN: a diverged block keeps its best state
                best, best_state = now, state()
    for path, t in trainable.items():
        t.load_state_dict(best_state[path])
    solved = {path: t.solution() for path, t in trainable.items()}
    return solved, {"block_error_before": before, "block_error": best}
