"""Grouped integers: ``w[o, i] = scale[o, g] * (code[o, i] - zero_point[o, g])``, 1 to 8 bits.

The codes are stored bit-sliced, most significant bit first, in the same three-dimensional int32
layout as :mod:`lutra.formats.bitplanes` (``[bits, out, ceil(in / 32)]``): any width packs without
waste, the rows shard as they are, and a reader that does not know the format fails on the shape
instead of running garbage. What differs from bit planes is the zero point, an integer here.

Shape suffixes: O out features, I in features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.errors import CheckpointError
from lutra.formats.bitplanes import (
    BitPlanes,
    expand_groups,
    groups_per_row,
    pack_codes,
    unpack_bits,
    words_per_row,
)


@dataclass
class Grouped:
    """A weight matrix ``[out_features, in_features]`` on a uniform integer grid.

    Attributes:
        codes: int32 ``[bits, out, ceil(in / 32)]``, bit-sliced codes in [0, 2^bits).
        scale: float ``[1, out, groups]``, the step of the grid.
        zero_point: uint8 ``[out, groups]``, the code that means zero.
        in_features: number of inputs.
        group_size: inputs per group.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    in_features: int
    group_size: int

    def __post_init__(self) -> None:
        o, g = self.codes.shape[1], groups_per_row(self.in_features, self.group_size)
        if (
            self.codes.dtype != torch.int32
            or self.codes.shape[2] != words_per_row(self.in_features)
            or self.scale.shape != (1, o, g)
            or self.zero_point.shape != (o, g)
        ):
            raise CheckpointError(
                f"grouped codes {tuple(self.codes.shape)} {self.codes.dtype}, scale "
                f"{tuple(self.scale.shape)} and zero point {tuple(self.zero_point.shape)} do not "
                f"fit {self.in_features} inputs in groups of {self.group_size}"
            )

    @property
    def bits(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @classmethod
    def from_codes(
        cls,
        codes_OI: Tensor,
        step_OG: Tensor,
        zero_point_OG: Tensor,
        bits: int,
        group_size: int,
        dtype: torch.dtype = torch.float16,
    ) -> Grouped:
        """Pack codes ``[out, in]`` in [0, 2^bits) with integer zero points."""
        return cls(
            pack_codes(codes_OI, bits),
            step_OG[None].to(dtype),
            zero_point_OG.to(torch.uint8),
            codes_OI.shape[-1],
            group_size,
        )

    def unpack_codes(self) -> Tensor:
        """Codes ``[out, in]`` as int32."""
        codes_OI = unpack_bits(self.codes[0], self.in_features).to(torch.int32)
        for slice_OJ in self.codes[1:]:
            codes_OI = codes_OI * 2 + unpack_bits(slice_OJ, self.in_features)
        return codes_OI

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[out, in]``: the oracle."""
        step_OI = expand_groups(self.scale[0].to(dtype), self.group_size, self.in_features)
        zero_OI = expand_groups(self.zero_point.to(dtype), self.group_size, self.in_features)
        return step_OI * (self.unpack_codes().to(dtype) - zero_OI)

    def to_bitplanes(self) -> BitPlanes:
        """The same weights as uniform bit planes (float32 scales, so nothing is rounded)."""
        alpha_1OG = self.scale.to(torch.float32) * 2.0 ** (self.bits - 2)
        center = (2**self.bits - 1) / 2
        offset_OG = self.scale[0].to(torch.float32) * (center - self.zero_point.to(torch.float32))
        return BitPlanes(self.codes, alpha_1OG, offset_OG, self.in_features, self.group_size)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by the suffix that they carry on disk after the layer's name and a dot."""
        return {
            "weight": self.codes,
            "weight_scale": self.scale,
            "weight_zero_point": self.zero_point,
        }

    def bits_per_weight(self) -> float:
        """Stored bits per weight, counted from the tensors themselves."""
        stored = sum(t.numel() * t.element_size() * 8 for t in self.tensors().values())
        return stored / (self.out_features * self.in_features)
