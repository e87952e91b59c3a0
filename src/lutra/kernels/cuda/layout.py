"""From stored bit planes to the order in which the CUDA kernels read them, and back.

`common.cuh` draws the layout. Both directions are exact permutations plus padding: rows to a
multiple of 16, inputs to a multiple of 256. A group size that the kernels do not know is stored as
several equal groups of one that they know (384 as three of 128).

Shape suffixes: T tiles of 16 rows, S slices of 128 inputs, Q planes, L slots of scales, G groups,
H the two halves of a tile, R the 8 rows of a half, B the 4 blocks of 32 inputs of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row
from lutra.kernels.dispatch import LinearSpec

TILE_ROWS, SLICE_INPUTS, ITEM_INPUTS = 16, 128, 256
WHOLE_ITEMS = 256  # value of GROUP in the sources for groups of one or more whole items


@dataclass(frozen=True)
class Layout:
    """Sizes of a prepared weight.

    Attributes:
        rows, inputs: shape of the matrix.
        bits: planes.
        slots: scales per row and group, the offset included.
        group: the group size in the sources: 32, 64, 128 or 256 (any multiple of 256, or a row).
        groups: groups stored per row, padding included.
        items_per_group: items of 256 inputs in a group if ``group`` is 256, else 1.
        copies: stored groups per group of the format.
    """

    rows: int
    inputs: int
    bits: int
    slots: int
    group: int
    groups: int
    items_per_group: int
    copies: int

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE_ROWS)

    @property
    def items(self) -> int:
        return -(-self.inputs // ITEM_INPUTS)


def unsupported_group(group_size: int, in_features: int) -> str | None:
    """Why a group size cannot be laid out, or None."""
    if group_size % 32 and group_size < in_features:
        return f"group size {group_size} is not a multiple of 32"
    return None


@cache
def layout_of(rows: int, inputs: int, bits: int, group_size: int, uniform: bool) -> Layout:
    """Layout of a weight ``[rows, inputs]`` in groups of ``group_size``."""
    slots = 2 if uniform else bits + 1
    items = -(-inputs // ITEM_INPUTS)
    if group_size >= inputs:
        return Layout(rows, inputs, bits, slots, WHOLE_ITEMS, 1, items, 1)
    if group_size % ITEM_INPUTS == 0:
        groups = groups_per_row(inputs, group_size)
        return Layout(
            rows, inputs, bits, slots, WHOLE_ITEMS, groups, group_size // ITEM_INPUTS, 1
        )
    group = next(g for g in (128, 64, 32) if group_size % g == 0)
    return Layout(
        rows, inputs, bits, slots, group, items * ITEM_INPUTS // group, 1, group_size // group
    )


def layout_for(spec: LinearSpec) -> Layout:
    return layout_of(
        spec.out_features, spec.in_features, spec.bits, spec.group_size, spec.uniform
    )


def to_kernel_order(weight: BitPlanes, layout: Layout) -> list[Tensor]:
    """``[planes, scales]`` as flat tensors: int32, and the dtype of the stored scales."""
    rows = layout.tiles * TILE_ROWS
    words = layout.items * ITEM_INPUTS // 32
    q, o, j = weight.planes.shape
    planes = torch.nn.functional.pad(weight.planes, (0, words - j, 0, rows - o))
    planes_QTHRSB = planes.view(q, layout.tiles, 2, 8, words // 4, 4)
    planes_TSQRBH = planes_QTHRSB.permute(1, 4, 0, 3, 5, 2).contiguous()

    scale_LOG = torch.cat([weight.scale, weight.offset[None]])
    if layout.copies > 1:
        scale_LOG = scale_LOG.repeat_interleave(layout.copies, dim=-1)
    scale_LOG = scale_LOG[..., : layout.groups]
    padding = (0, layout.groups - scale_LOG.shape[-1], 0, rows - o)
    scale_LOG = torch.nn.functional.pad(scale_LOG, padding)
    scale_LTHRG = scale_LOG.view(layout.slots, layout.tiles, 2, 8, layout.groups)
    scale_TGRLH = scale_LTHRG.permute(1, 4, 3, 0, 2).contiguous()
    return [planes_TSQRBH.view(-1), scale_TGRLH.view(-1)]


def scales_size(layout: Layout) -> int:
    """Elements of the prepared scales of :func:`to_kernel_order`."""
    return layout.tiles * layout.groups * 16 * layout.slots


def from_kernel_order(prepared: list[Tensor], layout: Layout, group_size: int) -> BitPlanes:
    """Inverse of :func:`to_kernel_order`, bit for bit."""
    planes, scales = prepared[0], prepared[1][: scales_size(layout)]  # more may follow
    words = layout.items * ITEM_INPUTS // 32
    planes_TSQRBH = planes.view(layout.tiles, words // 4, layout.bits, 8, 4, 2)
    planes_QOJ = planes_TSQRBH.permute(2, 0, 5, 3, 1, 4).reshape(layout.bits, -1, words)
    stored_words = words_per_row(layout.inputs)
    scale_TGRLH = scales.view(layout.tiles, layout.groups, 8, layout.slots, 2)
    scale_LOG = scale_TGRLH.permute(3, 0, 4, 2, 1).reshape(layout.slots, -1, layout.groups)
    groups = groups_per_row(layout.inputs, group_size)
    scale_LOG = scale_LOG[:, : layout.rows, :: layout.copies][..., :groups].contiguous()
    return BitPlanes(
        planes_QOJ[:, : layout.rows, :stored_words].contiguous(),
        scale_LOG[:-1].contiguous(),
        scale_LOG[-1].contiguous(),
        layout.inputs,
        group_size,
    )


def is_short(layout: Layout, scale_bytes: int) -> bool:
    """Up to 4 bits, groups of 128 and more, scales in half: what several kernels of Hopper take."""
    return layout.bits <= 4 and layout.group >= 128 and scale_bytes == 2
