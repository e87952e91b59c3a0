"""The values that a group of weights may take: equally spaced, or sums of signed scales.

Both kinds answer the same three questions (which code is nearest, what is a code worth, which
tensors are stored), so that GPTQ, AWQ, clipping and coordinate descent are written once.

Shape suffixes: N groups (any batch of rows), S inputs, Q planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lutra.solvers import bcq


class Levels(Protocol):
    """Levels of a batch of groups."""

    def encode(self, weight_NS: Tensor) -> Tensor:
        """Code of the nearest level, ``[N, S]`` in [0, 2^bits)."""

    def decode(self, codes_NS: Tensor) -> Tensor:
        """Value of each code, ``[N, S]``."""


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
    def center(self) -> float:
        return (2**self.bits - 1) / 2

    def encode(self, weight_NS: Tensor) -> Tensor:
        step_N1 = torch.where(self.step_N == 0, 1.0, self.step_N)[:, None]
        position = (weight_NS - self.offset_N[:, None]) / step_N1 + self.center
        return position.round().clamp_(0, 2**self.bits - 1).to(torch.int64)

    def decode(self, codes_NS: Tensor) -> Tensor:
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

    def encode(self, weight_NS: Tensor) -> Tensor:
        return bcq.nearest_codes(weight_NS, self.alpha_NQ, self.offset_N)

    def decode(self, codes_NS: Tensor) -> Tensor:
        return bcq.levels_of(self.alpha_NQ, self.offset_N).gather(-1, codes_NS)
