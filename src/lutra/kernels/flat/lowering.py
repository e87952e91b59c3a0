"""How flattened integers become columns of a narrow multiplier. Every way gives the same sum.

The multiplier takes digits of ``digit_bits``: 8 on Hopper and CPUs, 4 where the GPU has ``mma.s4``.
``Q = 2^(digit_bits-1) - 1``, ``B = 2 Q + 1``. An activation integer q of a channel with ``limit``

- up to Q is one column;
- up to 2 Q is two columns, or up to n Q in the ``unary`` scheme n columns: piece j is
  ``clamp(q, -(j+1) Q, (j+1) Q) - clamp(q, -j Q, j Q)``, and the weight column is repeated;
- beyond has two digits, ``q = B h + l`` with ``|l| <= Q``: one column for l, and one "high" column
  for h (several, in pieces of Q, where ``|h|`` can pass Q).

    acc = B * (sum over high columns) + (sum over all other columns)

So a kernel runs the tiles of high columns first, multiplies its accumulators by B once, and goes on
with the rest::

    [ high columns, zeros up to a tile | first columns 0 ... K-1 | further columns | zeros ]
      `high` columns in all              one a channel, in order   pieces, weight digits

Weights of several digits are several columns with the same activation; where their sum fits a digit
of the multiplier they may be added up instead (``merge``), which is how 4-bit weights with wide
channels run on 8-bit multipliers at no cost in columns.

`source` and `piece` say what stands in each column: ``piece`` j >= 0 is unary piece j, -1 is the
low digit, -2 - j is piece j of the high digit. Padding has source 0, piece 0 and weights of 0.

Shape suffixes: M tokens, O out features, I in features, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.formats.flat import FlatWeight, largest_digit, within_runs

LOW = -1
HIGH = -2
#: The step of a token that is all zeros, and the least of any: the smallest normal float32.
SMALLEST_STEP = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Lowered:
    """A layer in columns of a multiplier. See the module's docstring.

    Attributes:
        digits: int8 ``[out, columns]``, weights.
        source: int32 ``[columns]``, channel of each column.
        piece: int16 ``[columns]``, which part of the channel's integer it takes.
        origin: int32 ``[columns]``, the column of weights that stands here (without ``merge`` the
            stored one); -1 for padding.
        high: columns that are multiplied by the base, in front; a multiple of the tile.
        base: B.
    """

    digits: Tensor
    source: Tensor
    piece: Tensor
    origin: Tensor
    high: int
    base: int

    @property
    def columns(self) -> int:
        return self.digits.shape[1]


def lower(
    weight: FlatWeight,
    digit_bits: int = 8,
    tile: int = 1,
    scheme: str = "digits",
    merge: bool = True,
) -> Lowered:
    """Columns of a layer for a multiplier of ``digit_bits``.

    Args:
        weight: the layer; its own digits must not be wider than the multiplier's.
        digit_bits: 4 or 8.
        tile: the high columns and all columns are each padded to a multiple of this.
        scheme: ``digits``, or ``unary`` for pieces alone, however many (there is no high part).
        merge: whether weight digits of a channel are added up where the sum fits.
    """
    if weight.bits > digit_bits:
        raise ValueError(f"digits of {weight.bits} bits do not fit a multiplier of {digit_bits}")
    most = largest_digit(digit_bits)
    base = 2 * most + 1
    in_features = weight.in_features
    device = weight.digits.device
    channel_I = torch.arange(in_features, device=device)
    if merge:
        wide_OI = weight.wide()
        largest_I = wide_OI.abs().amax(0) if len(wide_OI) else torch.zeros_like(weight.limit)
        fits_I = largest_I <= most
        first_OI = torch.where(fits_I, wide_OI, weight.digit_columns()[:, :in_features].int())
        kept_E = ~fits_I[weight.source.long()]
    else:
        first_OI = weight.digit_columns()[:, :in_features].int()
        kept_E = torch.ones_like(weight.source, dtype=torch.bool)
    extra_OE = weight.digit_columns()[:, in_features:][:, kept_E].int()
    # Columns of weights, and the channel of each.
    weights_OW = torch.cat([first_OI, extra_OE], dim=1)
    channel_W = torch.cat([channel_I, weight.source.long()[kept_E]])

    limit_I = weight.limit.long()
    digits_I = limit_I > 2 * most if scheme == "digits" else torch.zeros_like(limit_I).bool()
    pieces_I = torch.where(digits_I, 1, (-(-limit_I // most)).clamp_min(1))
    high_I = torch.where(digits_I, -(-((limit_I + most) // base) // most), 0)

    weight_W = torch.arange(len(channel_W), device=device)
    high_W = high_I[channel_W]
    high_which = weight_W.repeat_interleave(high_W)
    high_piece = HIGH - within_runs(high_W)
    further_W = pieces_I[channel_W] - 1
    further_which = weight_W.repeat_interleave(further_W)
    further_piece = within_runs(further_W) + 1
    first_piece = torch.where(digits_I[channel_W], LOW, 0)

    # A column of -1 stands for padding until the end.
    high_part, high_pieces = _padded(high_which, high_piece, tile)
    rest, rest_pieces = _padded(
        torch.cat([weight_W, further_which]), torch.cat([first_piece, further_piece]), tile
    )
    which_C = torch.cat([high_part, rest])
    piece_C = torch.cat([high_pieces, rest_pieces])
    padding_C = which_C < 0
    origin_C = which_C.to(torch.int32)
    which_C = which_C.clamp_min(0)
    digits_OC = torch.where(padding_C, 0, weights_OW[:, which_C]).to(torch.int8)
    source_C = torch.where(padding_C, 0, channel_W[which_C])
    return Lowered(
        digits_OC.contiguous(),
        source_C.to(torch.int32),
        torch.where(padding_C, 0, piece_C).to(torch.int16),
        origin_C,
        len(high_part),
        base,
    )


def _padded(which: Tensor, piece: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    padding = -len(which) % tile
    which = torch.nn.functional.pad(which, (0, padding), value=-1)
    return which, torch.nn.functional.pad(piece, (0, padding))


def quantize_input(
    x_MI: Tensor, limit_I: Tensor, step: Tensor | None, smooth_I: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The wide integers of activations and their steps. float32, divisions as IEEE has them.

    Args:
        x_MI: activations ``[tokens, in]``, any float dtype.
        limit_I: largest integer of each channel.
        step: static step ``[1]``; None takes ``max_k |x[k]| / limit[k]`` of each token.
        smooth_I: by what the inputs are divided first.

    Returns:
        q int32 ``[tokens, in]`` and step float32 ``[tokens]``. A token with NaN or infinity has
        integers 0 and a step of NaN, so that its outputs are NaN and not numbers that look sound.
    """
    x_MI = x_MI.to(torch.float32)
    if smooth_I is not None:
        x_MI = x_MI / smooth_I
    limit_I = limit_I.to(torch.float32)
    if step is None:
        ratio_MI = x_MI.abs() / limit_I
        step_M = ratio_MI.amax(1) if x_MI.shape[1] else x_MI.new_zeros(len(x_MI))
        step_M = step_M.clamp_min(SMALLEST_STEP)
        sound_M = torch.isfinite(step_M)  # the largest of a row is NaN or infinite if any is
    else:
        step_M = step.to(torch.float32).expand(len(x_MI))
        sound_M = torch.isfinite(x_MI).all(1)
    q_MI = (x_MI / step_M[:, None]).round_().clamp_(-limit_I, limit_I)
    # No look at the values, which a CUDA graph that is being captured could not take.
    q_MI = torch.where(sound_M[:, None], q_MI, 0.0)
    step_M = torch.where(sound_M, step_M, torch.nan)
    return q_MI.to(torch.int32), step_M


def activation_digits(q_MI: Tensor, lowered: Lowered) -> Tensor:
    """The int8 ``[tokens, columns]`` that meets :attr:`Lowered.digits`."""
    most = (lowered.base - 1) // 2
    q_MC = q_MI[:, lowered.source.long()].to(torch.int64)
    piece_C = lowered.piece.to(torch.int64)

    def part(value: Tensor, j_C: Tensor) -> Tensor:
        upper, lower_ = (j_C + 1) * most, j_C * most
        return value.clamp(-upper, upper) - value.clamp(-lower_, lower_)

    # Rounding to the nearest multiple of B: the base is odd, so there are no ties.
    high_MC = torch.div(q_MC + most, lowered.base, rounding_mode="floor")
    low_MC = q_MC - lowered.base * high_MC
    unary_MC = part(q_MC, piece_C.clamp_min(0))
    high_piece_MC = part(high_MC, (HIGH - piece_C).clamp_min(0))
    chosen = torch.where(piece_C >= 0, unary_MC, torch.where(piece_C == LOW, low_MC, high_piece_MC))
    return chosen.to(torch.int8)


def accumulate(digits_MC: Tensor, lowered: Lowered) -> Tensor:
    """int64 ``[tokens, out]``: what a kernel's accumulators must hold at the end."""
    high = lowered.high
    x_MC, w_OC = digits_MC.double(), lowered.digits.double()  # exact below 2^53
    high_MO = x_MC[:, :high] @ w_OC[:, :high].T
    rest_MO = x_MC[:, high:] @ w_OC[:, high:].T
    return (high_MO * lowered.base + rest_MO).to(torch.int64)
