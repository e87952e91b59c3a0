"""From a solver's codes and levels to the tensors of a storage format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lutra.formats.bitplanes import BitPlanes, pack_codes
from lutra.formats.grouped import Grouped
from lutra.methods import scale_dtype
from lutra.scheme import Format
from lutra.solvers.gptq_loop import Solution
from lutra.solvers.levels import FreeLevels, Levels, UniformLevels


def pack(
    solution: Solution, format: Format, served: Mapping[int, Solution] | None = None
) -> BitPlanes | Grouped:
    """Pack a solution as ``format`` says.

    Args:
        solution: codes and levels at the full width.
        format: storage format; a ``ubcq`` or ``int`` format takes uniform levels, ``bcq`` free.
        served: solutions for lower precisions whose codes are prefixes of the full codes.
    """
    scale, offset = stored_scales(solution)
    if format.kind == "int":
        levels = [lv for lv in solution.levels if isinstance(lv, UniformLevels)]
        step_OG = scale[0] / 2.0 ** (format.bits - 2)
        safe_OG = torch.where(step_OG == 0, 1.0, step_OG)
        zero_OG = (levels[0].center - offset / safe_OG).round().clamp(0, 2**format.bits - 1)
        dtype = scale_dtype(step_OG)
        return Grouped.from_codes(
            solution.codes_OI, step_OG, zero_OG, format.bits, solution.group_size, dtype
        )
    lower_scales = {bits: stored_scales(lower) for bits, lower in sorted((served or {}).items())}
    # One dtype for all, as the format has one; lower precisions can have the largest scales.
    dtype = scale_dtype(scale, offset, *(t for pair in lower_scales.values() for t in pair))
    packed = BitPlanes(
        pack_codes(solution.codes_OI, format.bits), scale.to(dtype), offset.to(dtype),
        solution.codes_OI.shape[1], solution.group_size,
    )  # fmt: skip
    if lower_scales:
        packed.served = {b: (s.to(dtype), o.to(dtype)) for b, (s, o) in lower_scales.items()}
    return packed


def stored_scales(solution: Solution) -> tuple[Tensor, Tensor]:
    """Scale ``[planes or 1, out, groups]`` and offset ``[out, groups]`` of a solution, float32."""
    first = solution.levels[0]
    offset_OG = torch.stack([lv.offset_N for lv in solution.levels], dim=1)
    scale_POG = torch.stack([lv.scales_PN for lv in solution.levels], dim=2)
    if isinstance(first, UniformLevels):
        scale_POG = scale_POG * 2.0 ** (first.bits - 2)  # from the step to alpha of plane 0
    return scale_POG, offset_OG


def sorted_planes(solution: Solution) -> Solution:
    """Free levels with non-negative scales that fall from plane to plane; the values do not change.

    A negative scale is the same as a positive one with the plane's bits flipped, and the order of
    planes is a renaming of codes; both are settled so that plane 0 matters most.
    """
    parts = solution.codes_OI.split(solution.group_size, dim=1)
    codes: list[Tensor] = []
    levels: list[Levels] = []
    for codes_OS, found in zip(parts, solution.levels, strict=True):
        assert isinstance(found, FreeLevels)
        planes = found.alpha_NQ.shape[1]
        magnitude_NQ, order_NQ = found.alpha_NQ.abs().sort(dim=1, descending=True, stable=True)
        shifts_Q = torch.arange(planes - 1, -1, -1, device=codes_OS.device)
        bits_OSQ = (codes_OS[..., None] >> shifts_Q) & 1
        flipped_OQ = (found.alpha_NQ < 0).to(bits_OSQ.dtype)
        bits_OSQ = bits_OSQ ^ flipped_OQ[:, None]
        bits_OSQ = bits_OSQ.gather(2, order_NQ[:, None].expand_as(bits_OSQ))
        codes.append((bits_OSQ << shifts_Q).sum(-1))
        levels.append(FreeLevels(magnitude_NQ.contiguous(), found.offset_N))
    return Solution(torch.cat(codes, dim=1), levels, solution.group_size)
