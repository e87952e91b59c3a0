"""The values that a group of weights may take: equally spaced, or sums of signed scales.

Both kinds answer the same questions (which code is nearest, what is a code worth), so that GPTQ,
AWQ, clipping and coordinate descent are written once. They are asked once per column of a matrix,
so what does not depend on the weights is computed once.

Shape suffixes: N groups (any batch of rows), S inputs, Q planes, P stored scales, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lutra.solvers import bcq


@dataclass
class UniformLevels:
    """``offset + step * (code - (2^bits - 1) / 2)``, code in [0, 2^bits).

    Attributes:
        step_N: distance of neighbouring levels; 0 for a constant group.
        offset_N: centre of the levels.
        bits: width of the codes.
    """

    step_N: Tensor
    offset_N: Tensor
    bits: int

    @property
    def scales_PN(self) -> Tensor:
        """What is trained and stored: the step, ``[1, N]``."""
        return self.step_N[None]

    @property
    def center(self) -> float:
        return (2**self.bits - 1) / 2

    @cached_property
    def _divisor_N1(self) -> Tensor:
        return torch.where(self.step_N == 0, 1.0, self.step_N)[:, None]

    def nearest(self, weight_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Code of the nearest level, int64 ``[N, S]`` in [0, 2^bits), and that level's value."""
        position_NS = (weight_NS - self.offset_N[:, None]) / self._divisor_N1
        position_NS = position_NS.add_(self.center).round_().clamp_(0, 2**self.bits - 1)
        value_NS = (position_NS - self.center).mul_(self.step_N[:, None])
        return position_NS.to(torch.int64), value_NS.add_(self.offset_N[:, None])

    def decode(self, codes_NS: Tensor) -> Tensor:
        """Value of each code, ``[N, S]``."""
        centered = codes_NS.to(self.step_N.dtype) - self.center
        return self.offset_N[:, None] + self.step_N[:, None] * centered


@dataclass
class FreeLevels:
    """``offset + sum_q alpha_q * (+-1)``: binary-coded levels, spaced as the weights need.

    Attributes:
        alpha_NQ: scale of every plane.
        offset_N: offset.
    """

    alpha_NQ: Tensor
    offset_N: Tensor

    @property
    def bits(self) -> int:
        return self.alpha_NQ.shape[1]

    @property
    def scales_PN(self) -> Tensor:
        """What is trained and stored: the scale of every plane, ``[Q, N]``."""
        return self.alpha_NQ.T

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted levels ``[N, L]``, the code of each, and the midpoints between neighbours."""
        sorted_NL, code_NL = bcq.levels_of(self.alpha_NQ, self.offset_N).sort(dim=-1)
        return sorted_NL, code_NL, ((sorted_NL[:, 1:] + sorted_NL[:, :-1]) / 2).contiguous()

    def nearest(self, weight_NS: Tensor) -> tuple[Tensor, Tensor]:
        """Code of the nearest level, int64 ``[N, S]`` in [0, 2^planes), and that level's value."""
        sorted_NL, code_NL, midpoint_NL = self._table
        rank_NS = torch.searchsorted(midpoint_NL, weight_NS.contiguous())
        return code_NL.gather(-1, rank_NS), sorted_NL.gather(-1, rank_NS)

    def decode(self, codes_NS: Tensor) -> Tensor:
        """Value of each code, ``[N, S]``."""
        return bcq.levels_of(self.alpha_NQ, self.offset_N).gather(-1, codes_NS)


Levels = UniformLevels | FreeLevels
