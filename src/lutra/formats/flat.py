"""Flattened integers: one step for a whole token, and a widest integer for each input channel.

    q[t, k]   = clamp(round(x[t, k] / step[t]), -limit[k], limit[k])
    acc[t, n] = sum_k q[t, k] * W[n, k]                                     an exact integer
    y[t, n]   = acc[t, n] * (step[t] * weight_scale[n]) + bias[n]

This is FlattenQuant (arXiv 2402.17985) written in integers: a channel that is n times as large as
the rest has n times the range of the others instead of n channels, and how its integer is spread
over columns of a narrow multiplier is left to the kernel (:mod:`lutra.kernels.flat`). With
``Q = 2^(bits-1) - 1``, an ordinary channel has ``limit`` Q, one of n pieces n Q, and one of two
digits in base B = 2 Q + 1 has B Q + Q.

Weights are wide integers in the same way: ``|W[n, k]| <= m_k Q``. On disk they are digits of
``bits`` bits (two's complement, -2^(bits-1) unused). The first K columns are the first digit of
every channel; columns behind them hold the further digits of channels with m_k > 1, in the order of
the channels, and ``source`` says whose they are. So W[n, k] is the sum of the digits of channel k.

Inputs may be rotated before all this, in blocks of b by the Hadamard matrix, :func:`rotate_inputs`:
what spreads a few large values of a token over its other channels. The inputs that are left as they
are, one to b of them, are those with the widest range; :func:`rotated_blocks` says how many blocks
there are.

Layout (`weight`): int32 ``[1, out, words]``; column c is at bits ``(c mod (32/bits)) * bits`` of
word ``c div (32/bits)``. Columns past the last are 0.

Shape suffixes: O out features, I in features, E extra columns, C all stored columns, J words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.errors import CheckpointError, SchemeError

ACCUMULATOR_LIMIT = 2**31 - 1


def largest_digit(bits: int) -> int:
    """Q, the largest digit of a symmetric integer of so many bits: 7 for 4, 127 for 8."""
    return 2 ** (bits - 1) - 1


def words_of(columns: int, bits: int) -> int:
    """32-bit words that hold a row of so many digits."""
    per_word = 32 // bits
    return -(-columns // per_word)


def pack_digits(digits_OC: Tensor, bits: int) -> Tensor:
    """Digits ``[out, columns]`` (any integer dtype) as int32 words ``[1, out, words]``."""
    columns = digits_OC.shape[1]
    padding = words_of(columns, bits) * (32 // bits) - columns
    padded = torch.nn.functional.pad(digits_OC.to(torch.int8), (0, padding))
    if bits == 4:
        low, high = padded[:, 0::2] & 15, padded[:, 1::2] << 4
        padded = low | high
    return padded.contiguous().view(torch.int32)[None]  # little endian: byte 0 is the first


def unpack_digits(words_1OJ: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_digits`: int8 ``[out, columns]``."""
    packed = words_1OJ[0].contiguous().view(torch.int8)
    if bits == 4:
        low, high = (packed << 4) >> 4, packed >> 4  # int8 shifts to the right keep the sign
        packed = torch.stack([low, high], dim=-1).flatten(1)
    return packed[:, :columns].contiguous()


def rotated_blocks(in_features: int, block: int) -> int:
    """Blocks of inputs that are rotated: as many as leave one input or more as it is."""
    return (in_features - 1) // block


def rotate_inputs(x: Tensor, rotated_NB: Tensor) -> Tensor:
    """Turn blocks of inputs by the Hadamard matrix over the root of its size; others stay.

    Sums and differences of pairs at distances 1, 2, 4, ... in float32 and one product at the end,
    then rounded to the dtype of ``x``: the same numbers on every device and for any number of
    tokens. The matrix is symmetric and its own inverse.

    Args:
        x: ``[..., in]``, any float dtype.
        rotated_NB: int32 ``[blocks, b]``, the inputs of each block; b is a power of two.

    Returns:
        A new tensor like ``x``.
    """
    blocks, block = rotated_NB.shape
    index = rotated_NB.reshape(-1).long()
    values = x.index_select(-1, index).to(torch.float32).reshape(-1, blocks, block)
    other = torch.empty_like(values)
    distance = 1
    while distance < block:
        pairs = values.view(-1, blocks, block // (2 * distance), 2, distance)
        turned = other.view_as(pairs)
        torch.add(pairs[..., 0, :], pairs[..., 1, :], out=turned[..., 0, :])
        torch.sub(pairs[..., 0, :], pairs[..., 1, :], out=turned[..., 1, :])
        values, other = other, values
        distance *= 2
    values.mul_(block**-0.5)
    return x.index_copy(-1, index, values.reshape(*x.shape[:-1], index.numel()).to(x.dtype))


@dataclass
class FlatWeight:
    """A layer ``[out, in]`` in flattened integers. See the module's docstring.

    Attributes:
        digits: int32 ``[1, out, words]``.
        scale: float32 ``[out]``, what a weight of 1 is worth.
        limit: int32 ``[in]``, the largest integer of each input channel.
        source: int32 ``[extra]``, the channel of each column behind the first ``in``.
        bits: width of a digit, 4 or 8.
        in_features: number of input channels.
        step: float32 ``[1]``, the step of the activations if it is static; None where each token
            has its own, ``max_k |x[k]| / limit[k]``.
        smooth: float32 ``[in]``, by which inputs are divided first, where no layer before this one
            could take it up; else None.
        rotated: int32 ``[blocks, b]``, the inputs of each rotated block; else None.
    """

    digits: Tensor
    scale: Tensor
    limit: Tensor
    source: Tensor
    bits: int
    in_features: int
    step: Tensor | None = None
    smooth: Tensor | None = None
    rotated: Tensor | None = None

    def __post_init__(self) -> None:
        columns = self.in_features + self.source.numel()
        one, out, words = self.digits.shape
        vectors = {"step": (self.step, (1,)), "smooth": (self.smooth, (self.in_features,))}
        if (
            self.bits not in (4, 8)
            or self.digits.dtype != torch.int32
            or one != 1
            or words != words_of(columns, self.bits)
            or self.scale.shape != (out,)
            or self.limit.shape != (self.in_features,)
            or self.source.dim() != 1
            or (self.rotated is not None and not self._rotation_fits())
            or any(t is not None and t.shape != shape for t, shape in vectors.values())
        ):
            raise CheckpointError(
                f"digits {tuple(self.digits.shape)} {self.digits.dtype} of {self.bits} bits, scale "
                f"{tuple(self.scale.shape)}, limit {tuple(self.limit.shape)} and "
                f"{self.source.numel()} further columns do not fit {self.in_features} inputs"
                + ("" if self.rotated is None else f" rotated as {tuple(self.rotated.shape)}")
            )

    def _rotation_fits(self) -> bool:
        rotated = self.rotated
        return (
            rotated is not None
            and self.smooth is None
            and rotated.dtype == torch.int32
            and rotated.dim() == 2
            and len(rotated) == rotated_blocks(self.in_features, rotated.shape[1])
        )

    @classmethod
    def pack(
        cls,
        wide_OI: Tensor,
        scale_O: Tensor,
        limit_I: Tensor,
        bits: int,
        step: Tensor | None = None,
        smooth_I: Tensor | None = None,
        rotated_NB: Tensor | None = None,
    ) -> FlatWeight:
        """Store wide integers: each channel in as many digits as its largest weight needs.

        Args:
            wide_OI: integers ``[out, in]``.
            scale_O: float32, what a weight of 1 is worth in each output.
            limit_I: the largest integer of each input channel.
            bits: 4 or 8.
            step: float32 ``[1]`` for static activations.
            smooth_I: float32 ``[in]``, what the inputs are divided by.
            rotated_NB: the blocks of inputs that are rotated; the integers belong to the inputs
                behind the rotation.

        Raises:
            SchemeError: the integers could leave the range of 32-bit accumulators.
        """
        wide_OI = wide_OI.to(torch.int64)
        check_accumulators(wide_OI, limit_I, bits)
        most = largest_digit(bits)
        largest_I = wide_OI.abs().amax(0) if len(wide_OI) else torch.zeros_like(limit_I).long()
        pieces_I = (-(-largest_I // most)).clamp_min(1)
        channels = torch.arange(wide_OI.shape[1], device=wide_OI.device)
        source_E = channels.repeat_interleave(pieces_I - 1)
        digits = [wide_OI.clamp(-most, most)]
        if source_E.numel():
            piece_E = within_runs(pieces_I - 1) + 1
            rows_OE = wide_OI[:, source_E]
            upper, lower = (piece_E + 1) * most, piece_E * most
            digits.append(rows_OE.clamp(-upper, upper) - rows_OE.clamp(-lower, lower))
        return cls(
            pack_digits(torch.cat(digits, dim=1), bits),
            scale_O.to(torch.float32).contiguous(),
            limit_I.to(torch.int32).contiguous(),
            source_E.to(torch.int32),
            bits,
            wide_OI.shape[1],
            None if step is None else step.to(torch.float32).reshape(1),
            None if smooth_I is None else smooth_I.to(torch.float32).contiguous(),
            None if rotated_NB is None else rotated_NB.to(torch.int32).contiguous(),
        )

    @property
    def out_features(self) -> int:
        return self.digits.shape[1]

    @property
    def columns(self) -> int:
        """Stored columns: the inputs and the further digits of weights."""
        return self.in_features + self.source.numel()

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by suffix of the layer's name."""
        stored = {
            "weight": self.digits,
            "weight_scale": self.scale,
            "input_limit": self.limit,
            "input_source": self.source,
        }
        if self.step is not None:
            stored["input_step"] = self.step
        if self.smooth is not None:
            stored["input_smooth"] = self.smooth
        if self.rotated is not None:
            stored["input_rotated"] = self.rotated
        return stored

    def digit_columns(self) -> Tensor:
        """The digits as int8 ``[out, columns]``."""
        return unpack_digits(self.digits, self.bits, self.columns)

    def wide(self) -> Tensor:
        """The wide integers W, int32 ``[out, in]``."""
        digits_OC = self.digit_columns().to(torch.int32)
        wide_OI = digits_OC[:, : self.in_features].clone()
        return wide_OI.index_add_(1, self.source.long(), digits_OC[:, self.in_features :])

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[out, in]`` that multiplies inputs which are not quantized."""
        dense_OI = self.wide().to(torch.float32) * self.scale[:, None]
        if self.smooth is not None:
            dense_OI = dense_OI / self.smooth
        if self.rotated is not None:
            dense_OI = rotate_inputs(dense_OI, self.rotated)
        return dense_OI.to(dtype)

    def bits_per_weight(self) -> float:
        """Stored bits over weights, everything of the layer counted but its bias."""
        stored = sum(t.numel() * t.element_size() for t in self.tensors().values())
        return 8 * stored / max(1, self.out_features * self.in_features)


def within_runs(counts: Tensor) -> Tensor:
    """0, 1, ... counts[0]-1, 0, 1, ... for every run; int64 ``[sum of counts]``."""
    ends = counts.cumsum(0)
    starts = (ends - counts).repeat_interleave(counts)
    return torch.arange(starts.numel(), device=counts.device) - starts


def check_accumulators(wide_OI: Tensor, limit_I: Tensor, bits: int) -> None:
    """Refuse integers whose sum of products could pass 2^31 - 1.

    What counts is what a kernel may hold on its way, so a channel counts with its largest integer
    and one digit of 8 bits more, which is what splitting it into two digits can add.

    Raises:
        SchemeError: with the largest sum that is possible.
    """
    if not wide_OI.numel():
        return
    room_I = limit_I.to(torch.int64) + largest_digit(8)
    worst = int((wide_OI.abs() * room_I).sum(1).amax())
    if worst > ACCUMULATOR_LIMIT:
        raise SchemeError(
            f"sums of products could reach {worst:,}, which 32-bit integers do not hold: too many "
            f"inputs ({wide_OI.shape[1]:,}) for the ranges of the channels. Use a smaller growth."
        )
