"""Bit planes: binary-coded weights with a scale per plane and group, and an offset per group.

    w[o, i] = sum_q alpha[q, o, g(i)] * b[q, o, i] + z[o, g(i)]
    b in {-1, +1},  g(i) = i // group_size

This is extended BCQ (LUT-GEMM, arXiv 2206.09557, section 3). Plane 0 is the most significant, so a
prefix of the planes is a lower-precision weight.

Two kinds of scale share the layout:

- *free levels*: ``scale`` is ``[planes, out, groups]``, one alpha per plane.
- *uniform levels*: ``scale`` is ``[1, out, groups]`` and holds alpha of plane 0;
  alpha[q] = alpha[0] / 2^q. Every uniform integer grid ``s * (c - zero_point)`` with B bits maps
  exactly: plane q is bit B-1-q of the code c, alpha[0] = s * 2^(B-2),
  z = s * ((2^B - 1) / 2 - zero_point). Because alpha[0] does not depend on how many planes follow,
  dropping trailing planes needs no rescaling.

Layout on disk (`weight`): int32 ``[planes, out, ceil(in / 32)]``; bit t of word j is input
32 j + t; 1 means +1, 0 means -1. Bits past ``in_features`` are 0 and mean nothing.

Shape suffixes: Q planes, O out features, I in features, J 32-bit words, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lutra.errors import CheckpointError

WORD_BITS = 32


def words_per_row(in_features: int) -> int:
    """Number of 32-bit words that hold one bit for each of ``in_features`` inputs."""
    return -(-in_features // WORD_BITS)


def groups_per_row(in_features: int, group_size: int) -> int:
    """Number of groups in a row; the last one is shorter if ``group_size`` does not divide."""
    return -(-in_features // group_size)


def expand_groups(per_group_xG: Tensor, group_size: int, in_features: int) -> Tensor:
    """Repeat values given per group along the last axis to one value per input, ``[..., in]``."""
    return per_group_xG.repeat_interleave(group_size, dim=-1)[..., :in_features]


def pack_bits(bits_xI: Tensor) -> Tensor:
    """Pack booleans ``[..., in]`` into int32 words ``[..., ceil(in / 32)]``, lowest input first."""
    in_features = bits_xI.shape[-1]
    padding = words_per_row(in_features) * WORD_BITS - in_features
    bits_xI = torch.nn.functional.pad(bits_xI.to(torch.uint8), (0, padding))
    bytes_x = bits_xI.unflatten(-1, (-1, 8))
    # Summing eight disjoint powers of two stays below 256, so uint8 arithmetic is exact.
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits_xI.device)
    packed = (bytes_x * powers).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)  # little endian: byte 0 holds inputs 0..7


def unpack_bits(words_xJ: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_bits`: int32 ``[..., words]`` to booleans ``[..., in_features]``."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words_xJ.device)
    bytes_x = words_xJ.contiguous().view(torch.uint8).unsqueeze(-1)
    return ((bytes_x >> shifts) & 1).flatten(-2)[..., :in_features].bool()


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Bit-slice codes in [0, 2^bits) into int32 planes ``[bits, out, words]``, highest bit first.

    Plane by plane and in bytes, so that packing takes little more memory than the codes.
    """
    codes_OI = codes_OI.to(torch.uint8)
    return torch.stack([pack_bits((codes_OI >> (bits - 1 - q)) & 1) for q in range(bits)])


def plane_scales(scale_QOG: Tensor, planes: int) -> Tensor:
    """Alpha of every plane, ``[planes, out, groups]``, from a free or a uniform scale tensor."""
    if scale_QOG.shape[0] != 1 or planes == 1:
        return scale_QOG[:planes]
    halving = 0.5 ** torch.arange(planes, dtype=scale_QOG.dtype, device=scale_QOG.device)
    return scale_QOG * halving[:, None, None]


@dataclass
class BitPlanes:
    """A weight matrix ``[out_features, in_features]`` as bit planes. See the module's docstring.

    Attributes:
        planes: int32 ``[planes, out, ceil(in / 32)]``.
        scale: float ``[planes, out, groups]`` (free levels) or ``[1, out, groups]`` (uniform).
        offset: float ``[out, groups]``.
        in_features: number of inputs (the last word may be partly used).
        group_size: inputs per group.
        served: scales and offsets refitted for prefixes of the planes, ``{bits: (scale, offset)}``.
    """

    planes: Tensor
    scale: Tensor
    offset: Tensor
    in_features: int
    group_size: int
    served: dict[int, tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        q, o, j = self.planes.shape
        g = groups_per_row(self.in_features, self.group_size)
        if (
            self.planes.dtype != torch.int32
            or j != words_per_row(self.in_features)
            or self.scale.shape not in ((q, o, g), (1, o, g))
            or self.offset.shape != (o, g)
        ):
            raise CheckpointError(
                f"bit planes {tuple(self.planes.shape)} {self.planes.dtype}, scale "
                f"{tuple(self.scale.shape)} and offset {tuple(self.offset.shape)} do not fit "
                f"{self.in_features} inputs in groups of {self.group_size}"
            )

    @property
    def bits(self) -> int:
        return self.planes.shape[0]

    @property
    def out_features(self) -> int:
        return self.planes.shape[1]

    @property
    def uniform(self) -> bool:
        """Whether the levels are equally spaced, with one stored scale per group."""
        return self.scale.shape[0] == 1 and self.bits > 1

    @classmethod
    def from_signs(
        cls, signs_QOI: Tensor, scale: Tensor, offset: Tensor, group_size: int
    ) -> BitPlanes:
        """Pack signs (positive means +1) ``[planes, out, in]``."""
        return cls(pack_bits(signs_QOI > 0), scale, offset, signs_QOI.shape[-1], group_size)

    @classmethod
    def from_uniform(
        cls,
        codes_OI: Tensor,
        step_OG: Tensor,
        zero_point_OG: Tensor,
        bits: int,
        group_size: int,
        dtype: torch.dtype = torch.float16,
    ) -> BitPlanes:
        """Map the grid ``step * (code - zero_point)``, codes in [0, 2^bits), exactly to planes.

        ``zero_point`` may be fractional. Exact in real arithmetic; ``offset`` is rounded once to
        ``dtype`` (LUT-GEMM, appendix on uniform quantization).
        """
        step_OG = step_OG.to(torch.float64)
        scale = (step_OG * 2.0 ** (bits - 2)).to(dtype)
        offset = (step_OG * ((2**bits - 1) / 2 - zero_point_OG.to(torch.float64))).to(dtype)
        planes = pack_codes(codes_OI, bits)
        return cls(planes, scale[None], offset, codes_OI.shape[-1], group_size)

    def prefix(self, bits: int) -> BitPlanes:
        """The first ``bits`` planes as a lower-precision weight, without copying the planes."""
        if not 1 <= bits <= self.bits:
            raise ValueError(f"bits must be between 1 and {self.bits}, not {bits}")
        scale, offset = (self.served or {}).get(bits, (self.scale, self.offset))
        scale = scale if scale.shape[0] == 1 else scale[:bits]
        return BitPlanes(self.planes[:bits], scale, offset, self.in_features, self.group_size)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight ``[out, in]``: the oracle that every kernel is checked against."""
        alpha_QOG = plane_scales(self.scale.to(dtype), self.bits)
        weight_OI = expand_groups(self.offset.to(dtype), self.group_size, self.in_features)
        for plane_OJ, alpha_OG in zip(self.planes, alpha_QOG, strict=True):
            sign_OI = unpack_bits(plane_OJ, self.in_features).to(dtype) * 2 - 1
            weight_OI = weight_OI + sign_OI * expand_groups(
                alpha_OG, self.group_size, self.in_features
            )
        return weight_OI

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by the suffix that they carry on disk after the layer's name and a dot."""
        named = {"weight": self.planes, "weight_scale": self.scale, "weight_offset": self.offset}
        for bits, (scale, offset) in sorted((self.served or {}).items()):
            named[f"weight_scale_{bits}bit"] = scale
            named[f"weight_offset_{bits}bit"] = offset
        return named

    def bits_per_weight(self) -> float:
        """Stored bits per weight, counted from the tensors themselves."""
        stored = sum(t.numel() * t.element_size() * 8 for t in self.tensors().values())
        return stored / (self.out_features * self.in_features)
