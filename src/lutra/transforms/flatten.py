"""Flattening: give a few large channels a wider range, within a budget of columns.

    n_k = max(1, ceil(a_k / T)),   T = min { T : columns(T) <= K_max }

FlattenQuant (arXiv 2402.17985) expands large channels into several small ones so that a tensor can
share one scale. Its rule for the threshold T stands in no text that was at hand; the rule here is
our own: the smallest threshold, and so the smallest step, that a number of columns pays for. It
needs no assumption about how channels are distributed, and what padding to a multiple of the tile
would waste is spent on channels.

With ``Q = 2^(bits-1) - 1``, a channel of n pieces has integers up to n Q. It costs

- n columns (``unary``), or
- 1 column for n = 1, and 2 up to n = 2 Q + 2 (``digits``): two pieces, or two digits in base
  B = 2 Q + 1, which reach B Q + Q (112 for 4 bits, 32,512 for 8).

If the weights of channel k need m_k digits as well, all pairs are multiplied, n_k m_k columns.

Shape suffixes: I in features.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.formats.flat import largest_digit

SCHEMES = ("digits", "unary")
#: A channel that no number of columns can hold: so many that no budget pays for it.
_TOO_MANY = 1 << 40


@dataclass(frozen=True)
class Flattening:
    """Ranges of the channels of one input.

    Attributes:
        threshold: T; a channel up to it is left as it is. The step is ``threshold / Q``.
        pieces_I: n_k, int64 ``[in]``.
        limit_I: largest integer of each channel, int64 ``[in]``.
        columns: columns of a multiplier of this width, padding not counted.
        budget: columns that were allowed.
    """

    threshold: float
    pieces_I: Tensor
    limit_I: Tensor
    columns: int
    budget: int


def column_budget(in_features: int, growth: float, tile: int) -> int:
    """K_max: the whole tiles in ``K (1 + growth)``, but no fewer than K itself fills."""
    whole = int(in_features * (1 + growth) + 1e-9) // tile * tile
    return max(whole, -(-in_features // tile) * tile)


def pieces(absmax_I: Tensor, threshold: float) -> Tensor:
    """n_k = max(1, ceil(a_k / T)), int64 ``[in]``; :func:`columns` refuses what overflows."""
    ratio_I = (absmax_I.double() / threshold).ceil()
    return ratio_I.clamp(1, float(_TOO_MANY)).to(torch.int64)


def columns(pieces_I: Tensor, bits: int, scheme: str) -> Tensor:
    """Columns that each channel costs on a multiplier of ``bits``, int64 ``[in]``."""
    if scheme == "unary":
        return pieces_I
    most = largest_digit(bits)
    two_I = torch.where(pieces_I <= 2 * most + 2, 2, _TOO_MANY)
    return torch.where(pieces_I == 1, 1, two_I)


def limits(pieces_I: Tensor, bits: int, scheme: str) -> Tensor:
    """The largest integer of each channel, int64 ``[in]``.

    Two digits cost the same whatever they hold, so a channel that has them gets their whole range.
    """
    most = largest_digit(bits)
    unary_I = pieces_I * most
    if scheme == "unary":
        return unary_I
    return torch.where(pieces_I > 2, (2 * most + 1) * most + most, unary_I)


def smallest(holds: Callable[[float], bool], high: float) -> float:
    """The smallest positive double for which a monotone predicate holds, exactly.

    Positive doubles are ordered as their bits are, so bisecting the bits takes at most 63 steps and
    ends at the number itself. ``holds(high)`` must be true.
    """
    low_bits, high_bits = 0, _bits_of(high)
    while high_bits - low_bits > 1:
        middle = (low_bits + high_bits) // 2
        if holds(_double_of(middle)):
            high_bits = middle
        else:
            low_bits = middle
    return _double_of(high_bits)


def flatten(
    absmax_I: Tensor,
    bits: int,
    budget: int,
    scheme: str = "digits",
    weight_pieces_I: Tensor | None = None,
) -> Flattening | None:
    """Ranges with the smallest threshold whose columns the budget pays for.

    Args:
        absmax_I: largest value of each channel, not negative, finite.
        bits: width of the integers, 4 or 8.
        budget: columns in all.
        scheme: ``digits`` or ``unary``, see the module's docstring.
        weight_pieces_I: m_k, digits that the weights of each channel need; 1 where None.

    Returns:
        None if the weights' digits alone cost more than the budget. An input that is all zeros has
        threshold 0 and one piece everywhere.
    """
    ones_I = torch.ones_like(absmax_I, dtype=torch.int64)
    by_weight_I = ones_I if weight_pieces_I is None else weight_pieces_I
    if int(by_weight_I.sum()) > budget:
        return None
    highest = float(absmax_I.double().max()) if absmax_I.numel() else 0.0
    if highest == 0:
        return Flattening(0.0, ones_I, limits(ones_I, bits, scheme), int(by_weight_I.sum()), budget)

    def count(threshold: float) -> int:
        by_input_I = columns(pieces(absmax_I, threshold), bits, scheme)
        return int((by_input_I * by_weight_I).clamp_max(_TOO_MANY).double().sum())

    threshold = smallest(lambda t: count(t) <= budget, highest)
    found_I = pieces(absmax_I, threshold)
    return Flattening(threshold, found_I, limits(found_I, bits, scheme), count(threshold), budget)


def _bits_of(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _double_of(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
