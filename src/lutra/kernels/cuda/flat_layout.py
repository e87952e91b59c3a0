"""Flattened weights in the order of the flat CUDA kernels, the tables of their inputs, and back.

A layer is lowered to columns of the card's multiplier (:mod:`lutra.kernels.flat.lowering`) without
adding up digits, so the stored digits stand side by side in the result. High columns are padded to
32 bytes, all columns to tiles of 128 and rows to 128. What is kept:

- 8-bit columns: int8 ``[rows, columns]``.
- 4-bit columns on Hopper, which multiplies 8 bits: nibbles in the order in which a warp holds the
  first operand of a product of 64 rows by 32 inputs (`flat_wgmma.cuh`), so that unpacking is two
  masks and a shift. Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8; a word has four
  inputs 4 t .. 4 t + 3 of the first row in its low nibbles, the same of the second row in its high
  ones::

      [rows / 64][tiles of 128 inputs][halves h][128 threads][4 words][4 bytes]
      word 2 j + c of half h: inputs 64 h + 32 j + 16 c + 4 t + byte

- 4-bit columns on cards with 4-bit tensor cores (8.0 to 8.9): two columns a byte,
  ``[rows, columns / 2]``, the even column in the low nibble.

Shape suffixes: N rows, C columns, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.formats.flat import FlatWeight, largest_digit, pack_digits
from lutra.kernels.flat.lowering import Lowered, lower

COLUMN_TILE = 128
ROW_TILE = 128
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Multiplier:
    """What a card multiplies.

    Attributes:
        digit_bits: width of an activation column, 4 or 8.
        registers: whether 4-bit weights are kept in register order and unpacked to 8 bits.
    """

    digit_bits: int
    registers: bool


def multiplier_of(capability: tuple[int, int], bits: int) -> Multiplier:
    """How a card of this compute capability multiplies weights of ``bits`` bits."""
    if capability[0] == 8 and bits == 4:
        return Multiplier(4, False)
    return Multiplier(8, capability[0] == 9 and bits == 4)


@dataclass(frozen=True)
class Prepared:
    """Tensors of a prepared layer, in the order in which the ops take them.

    Attributes:
        weight: see the module's docstring.
        scale: float32 ``[rows padded]``.
        entries: int32 ``[E, 4]``: column, channel, piece and limit of every column that the sweep
            over the channels does not write as it must be; sorted by column.
        wide: int32 ``[W, 2]``: channel and limit of every channel without the common limit.
        keep: int16 ``[in up to a multiple of 8]``, 0 for those and 0x7FFF for all others, a mask
            that takes the absolute value of a 16-bit float; empty if none is wide.
        step: float32 ``[1]`` if static, else empty.
        smooth: float32 ``[in]`` or empty.
        form: an empty tensor of shape ``[0, high columns, common limit]``: two numbers that stay
            with the tensors and cost no memory.
    """

    weight: Tensor
    scale: Tensor
    entries: Tensor
    wide: Tensor
    keep: Tensor
    step: Tensor
    smooth: Tensor
    form: Tensor

    @property
    def registers(self) -> bool:
        return self.weight.dim() == 6

    @property
    def columns(self) -> int:
        if self.registers:
            return self.weight.shape[1] * COLUMN_TILE
        return self.weight.shape[1] * (2 if self.weight.dtype == torch.uint8 else 1)

    @property
    def digit_bits(self) -> int:
        """Width of an activation column."""
        return 4 if self.weight.dtype == torch.uint8 and not self.registers else 8

    @property
    def high(self) -> int:
        return self.form.shape[1]

    @property
    def limit(self) -> int:
        return self.form.shape[2]

    @property
    def clamp(self) -> int:
        """What the sweep cuts integers at.

        Dynamic steps keep channels within their limits by themselves, so that only the width of a
        column cuts, which makes the first unary piece of a wide channel.
        """
        return self.limit if self.step.numel() else largest_digit(self.digit_bits)

    def tensors(self) -> list[Tensor]:
        return [
            self.weight, self.scale, self.entries, self.wide, self.keep, self.step, self.smooth,
            self.form,
        ]  # fmt: skip


def prepare(weight: FlatWeight, multiplier: Multiplier) -> Prepared:
    """A layer in the order of the kernels, on the device where it lies."""
    rows = weight.out_features
    registers = multiplier.registers and _fits_sixteenfold(weight)
    parts: list[Tensor] = []
    lowered = lower_rows(weight, 0, 0, multiplier.digit_bits)
    for begin in range(0, max(1, rows), _ROWS_AT_ONCE):
        end = begin + _ROWS_AT_ONCE
        digits_NC = lower_rows(weight, begin, end, multiplier.digit_bits).digits
        digits_NC = torch.nn.functional.pad(digits_NC, (0, 0, 0, -len(digits_NC) % ROW_TILE))
        if registers:
            digits_NC = to_register_order(digits_NC)
        elif multiplier.digit_bits == 4:
            digits_NC = pack_pairs(digits_NC)
        parts.append(digits_NC)
    empty = weight.scale.new_empty(0)
    tables = input_tables(lowered, weight.limit, multiplier.digit_bits, weight.step is not None)
    entries, wide, keep, limit = tables
    return Prepared(
        torch.cat(parts) if len(parts) > 1 else parts[0],
        torch.nn.functional.pad(weight.scale, (0, -rows % ROW_TILE)),
        entries,
        wide,
        keep,
        empty if weight.step is None else weight.step,
        empty if weight.smooth is None else weight.smooth,
        entries.new_empty((0, lowered.high, limit)),
    )


def some_rows(weight: FlatWeight, begin: int, end: int) -> FlatWeight:
    """Some rows of a layer: rows are independent, and a whole large layer takes much memory."""
    return FlatWeight(
        weight.digits[:, begin:end], weight.scale[begin:end], weight.limit, weight.source,
        weight.bits, weight.in_features,
    )  # fmt: skip


def lower_rows(weight: FlatWeight, begin: int, end: int, digit_bits: int) -> Lowered:
    """Some rows in columns: the high ones padded to a product of 32 bytes, all to a tile."""
    lowered = lower(some_rows(weight, begin, end), digit_bits, tile=256 // digit_bits, merge=False)
    pad = torch.nn.functional.pad
    room = (0, -lowered.columns % COLUMN_TILE)
    return Lowered(
        pad(lowered.digits, room), pad(lowered.source, room), pad(lowered.piece, room),
        pad(lowered.origin, room, value=-1), lowered.high, lowered.base,
    )  # fmt: skip


def restore(prepared: Prepared, out_features: int, columns: int, bits: int) -> Tensor:
    """The stored digits, int32 ``[1, out, words]``, bit for bit.

    Args:
        columns: stored columns; they follow the high ones as they were.
    """
    digits_NC = prepared.weight
    if prepared.registers:
        digits_NC = from_register_order(digits_NC)
    elif prepared.digit_bits == 4:
        digits_NC = unpack_pairs(digits_NC)
    stored = digits_NC[:out_features, prepared.high : prepared.high + columns]
    return pack_digits(stored, bits)


def input_tables(
    lowered: Lowered, limit_I: Tensor, digit_bits: int, static: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """``entries``, ``wide``, ``keep`` and the common limit of :class:`Prepared`."""
    device = lowered.source.device
    inputs, first = limit_I.numel(), lowered.high
    limit_I = limit_I.to(device=device, dtype=torch.int64)
    most = largest_digit(digit_bits)
    narrow = limit_I[limit_I <= most]
    common = int(narrow.mode().values) if narrow.numel() else 1
    is_common_I = limit_I == common
    wide_W = (~is_common_I).nonzero()[:, 0]
    wide = torch.stack([wide_W, limit_I[wide_W]], dim=1).to(torch.int32)

    column_C = torch.arange(lowered.columns, device=device)
    channel_C, piece_C = lowered.source.long(), lowered.piece.long()
    swept_C = (column_C >= first) & (column_C < first + inputs)
    if static and common != most:
        right_C = is_common_I[channel_C]
    else:
        right_C = piece_C == 0
        if static:
            right_C &= limit_I[channel_C] >= most
    listed = column_C[(lowered.origin >= 0) & ~(swept_C & right_C)]
    entries = torch.stack(
        [listed, channel_C[listed], piece_C[listed], limit_I[channel_C[listed]]], dim=1
    ).to(torch.int32)

    if not len(wide):
        return entries, wide, limit_I.new_empty(0, dtype=torch.int16), common
    keep_I = torch.where(is_common_I, 0x7FFF, 0).to(torch.int16)
    return entries, wide, torch.nn.functional.pad(keep_I, (0, -inputs % 8)), common


def _fits_sixteenfold(weight: FlatWeight) -> bool:
    """Whether sums stay within 32 bits when weights are 16 times as large, as unpacking has it."""
    room_I = weight.limit.to(torch.int64) + largest_digit(8)
    for begin in range(0, weight.out_features, _ROWS_AT_ONCE):
        some = some_rows(weight, begin, begin + _ROWS_AT_ONCE)
        worst = (some.wide().abs().double() @ room_I.double()).amax()
        if 16 * float(worst) >= 2**31:
            return False
    return True


def to_register_order(digits_NC: Tensor) -> Tensor:
    """int8 ``[rows, columns]`` with values -8..7 to uint8 ``[rows / 64, tiles, 2, 128, 4, 4]``."""
    rows, columns = digits_NC.shape
    tiles = columns // COLUMN_TILE
    # rows: 64-row block, warp, which of the two rows, g; columns: tile, half, j, c, t, byte
    parts = digits_NC.view(rows // 64, 4, 2, 8, tiles, 2, 2, 2, 4, 4)
    parts = parts.permute(0, 4, 5, 1, 3, 8, 6, 7, 9, 2)
    packed = (parts[..., 0] & 15) | (parts[..., 1] << 4)
    return packed.reshape(rows // 64, tiles, 2, 128, 4, 4).contiguous().view(torch.uint8)


def from_register_order(packed: Tensor) -> Tensor:
    """Inverse of :func:`to_register_order`."""
    blocks, tiles = packed.shape[:2]
    words = packed.view(torch.int8)
    parts = torch.stack([(words << 4) >> 4, words >> 4], dim=-1)
    parts = parts.view(blocks, tiles, 2, 4, 8, 4, 2, 2, 4, 2)
    return parts.permute(0, 3, 9, 4, 1, 2, 6, 7, 5, 8).reshape(blocks * 64, tiles * COLUMN_TILE)


def pack_pairs(digits_NC: Tensor) -> Tensor:
    """int8 ``[rows, columns]`` with values -8..7 to uint8 ``[rows, columns / 2]``."""
    low, high = digits_NC[:, 0::2] & 15, digits_NC[:, 1::2] << 4
    return (low | high).contiguous().view(torch.uint8)


def unpack_pairs(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_pairs`."""
    words = packed.view(torch.int8)
    return torch.stack([(words << 4) >> 4, words >> 4], dim=-1).flatten(1)
