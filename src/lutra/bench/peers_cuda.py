"""Peers that `bench.cuda` can measure on a GPU, each only if its package is installed.

A builder takes ``(out_features, in_features, bits, group, dtype, device)`` and gives a candidate,
or None where the peer is not installed or has no such format. Random codes, no calibration: only
the time counts; the error of a product that rounds on its own terms is not ours to state and stays
empty.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lutra.bench.cuda import Call, Candidate

Builder = Callable[[int, int, int, int, torch.dtype, torch.device], Candidate | None]


def tinygemm(
    out_features: int, in_features: int, bits: int, group: int, dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """torch's own 4-bit product (`_weight_int4pack_mm`): bfloat16, groups of 32 to 256."""
    if bits != 4 or group not in (32, 64, 128, 256) or in_features % 128 or out_features % 8:
        return None

    def make() -> Call:
        codes = torch.randint(
            0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=device
        )
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(
            in_features // group, out_features, 2, dtype=torch.bfloat16, device=device
        )

        converted: list[Tensor] = []  # x and x in bfloat16: converted once, outside the timed graph

        def call(x: Tensor) -> Tensor:
            if not converted or converted[0] is not x:
                converted[:] = [x, x.bfloat16()]
            return torch.ops.aten._weight_int4pack_mm(converted[1], packed, group, scales)

        return call

    size = out_features * (in_features // 2 + in_features // group * 4)
    return Candidate("tinygemm", 4, group, size, make)


def bitsandbytes(
    out_features: int, in_features: int, bits: int, group: int, dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """bitsandbytes' 4-bit normal floats, scales in blocks of ``group``."""
    if bits != 4 or group not in (64, 128, 256) or not importlib.util.find_spec("bitsandbytes"):
        return None
    bnb: Any = importlib.import_module("bitsandbytes")

    def make() -> Call:
        weight = torch.randn(out_features, in_features, dtype=dtype, device=device)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=group, quant_type="nf4")
        return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)

    size = out_features * (in_features // 2 + in_features // group * 4)
    return Candidate("bitsandbytes", 4, group, size, make)


PEERS: dict[str, Builder] = {"tinygemm": tinygemm, "bitsandbytes": bitsandbytes}
