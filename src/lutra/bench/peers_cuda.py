"""Peers that `bench.cuda` can measure on a GPU, each only if its package is installed.

A builder takes ``(out_features, in_features, bits, group, dtype, device)`` and gives a candidate,
or None where the peer is not installed or has no such format. Random weights or codes, no
calibration: only the time counts; the error of a product that rounds on its own terms is not ours
to state and stays empty. Peers that take bfloat16 alone get x converted outside of the timed part.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lutra.bench.cuda import Call, Candidate

Builder = Callable[[int, int, int, int, torch.dtype, torch.device], Candidate | None]


def tinygemm(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
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

        return _in_bfloat16(
            lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)
        )

    size = out_features * (in_features // 2 + in_features // group * 4)
    return Candidate("tinygemm", 4, group, size, make)


def bitsandbytes(
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """bitsandbytes' 4-bit normal floats, scales in blocks of ``group``."""
    if bits != 4 or group not in (64, 128, 256) or not importlib.util.find_spec("bitsandbytes"):
        return None

    def make() -> Call:
        bnb: Any = importlib.import_module("bitsandbytes")
        weight = torch.randn(out_features, in_features, dtype=dtype, device=device)
        packed, state = bnb.functional.quantize_4bit(weight, blocksize=group, quant_type="nf4")
        return lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state)

    size = out_features * (in_features // 2 + in_features // group * 4)
    return Candidate("bitsandbytes", 4, group, size, make)


def humming(
    out_features: int, in_features: int, bits: int, group: int, dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """humming-kernels: integer weights of any width with a scale per group, symmetric.

    It compiles a kernel for each of some ninety ranges of tokens at the first product; of these,
    all of its own choice, it is given the one that a batch falls into (and the first, which its
    launcher looks up as well).
    """
    if group <= 0 or not importlib.util.find_spec("humming"):
        return None
    chosen: dict[int, str] = {}

    def settings(layer: Any, tokens: int) -> str:
        if tokens not in chosen:
            tune: Any = importlib.import_module("humming.tune")
            ranges = tune.get_heuristics_config(layer.humming_config, device=device)
            chosen[tokens] = json.dumps([r for r in ranges if r[0] < 1 or r[0] < tokens <= r[1]])
        return chosen[tokens]

    def make() -> Call:
        layers: Any = importlib.import_module("humming.layer")
        with device:
            layer = layers.HummingLayer(
                shape_n=out_features, shape_k=in_features, torch_dtype=dtype,
                weight_config={"dtype": f"int{bits}", "group_size": group},
            )
            layer.load_from_unquantized(torch.randn(out_features, in_features, dtype=dtype))
        layer.transform()
        return lambda x: layer(x, tuning_config=settings(layer, x.shape[0]))

    size = out_features * (in_features * bits // 8 + in_features // group * 2)
    return Candidate("humming-kernels", bits, group, size, make)


def gemlite(
    out_features: int, in_features: int, bits: int, group: int, dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """gemlite's Triton kernels: 1, 2, 4 and 8 bits with a scale and a zero point per group."""
    if bits not in (1, 2, 4, 8) or group <= 0 or not importlib.util.find_spec("gemlite"):
        return None

    def make() -> Call:
        helper: Any = importlib.import_module("gemlite.helper")
        codes = torch.randint(
            0, 1 << bits, (out_features, in_features), dtype=torch.uint8, device=device
        )
        groups = out_features * in_features // group
        scales = torch.rand(groups, 1, dtype=dtype, device=device) * 0.02
        zeros = torch.full_like(scales, (1 << bits) // 2)
        packer = helper.A16Wn(device=str(device), dtype=dtype)
        layer = packer.from_weights(codes, scales, zeros, bits, group)
        return lambda x: layer(x)

    size = out_features * (in_features * bits // 8 + in_features // group * 4)
    return Candidate("gemlite", bits, group, size, make)


def fbgemm(
    out_features: int, in_features: int, bits: int, group: int, dtype: torch.dtype,
    device: torch.device,
) -> Candidate | None:
    """FBGEMM's mixed product for Hopper: bfloat16 times 4 bits, groups of 128 and more."""
    if bits != 4 or group < 128 or not importlib.util.find_spec("fbgemm_gpu"):
        return None

    def make() -> Call:
        quantize: Any = importlib.import_module("fbgemm_gpu.experimental.gen_ai.quantize")
        weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device=device)
        packed, (scale, zero) = quantize.quantize_int4_preshuffle(weight, group, dtype="bf16")
        return _in_bfloat16(
            lambda x: torch.ops.fbgemm.bf16i4bf16_shuffled(x, packed, scale, zero)
        )

    size = out_features * (in_features // 2 + in_features // group * 4)
    return Candidate("fbgemm-gpu-genai", 4, group, size, make)


def _in_bfloat16(product: Call) -> Call:
    converted: list[Tensor] = []  # x and x in bfloat16: converted once, outside the timed graph

    def call(x: Tensor) -> Tensor:
        if not converted or converted[0] is not x:
            converted[:] = [x, x.bfloat16()]
        return product(converted[1])

    return call


PEERS: dict[str, Builder] = {
    "humming-kernels": humming, "gemlite": gemlite, "fbgemm-gpu-genai": fbgemm,
    "bitsandbytes": bitsandbytes, "tinygemm": tinygemm,
}
