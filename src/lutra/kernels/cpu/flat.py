"""The CPU kernel of flattened integers (`flat.h`) as an op and as a choice of the dispatcher.

One pass over the activations quantizes them and writes the columns of an 8-bit multiplier; the
product is exact in 32-bit integers, and the epilogue scales, adds the bias and rounds once. So the
result is, bit for bit, that of :mod:`lutra.kernels.flat.reference`, on every instruction set, for
any number of tokens and of threads. Weights of 4 bits stay 4 bits in memory and are unpacked in
registers, or on a matrix unit (AMX) for two tiles of outputs at a time.

``LUTRA_CPU_ISA`` forces an instruction set: ``amx``, ``avx512vnni``, ``avxvnni``, ``avx2`` or
``portable``; ``avx512bw`` and ``neon``, which have no kernel of their own here, take ``avx2`` and
``portable``.

Prepared: uint8 ``data`` in the layout of `flat.h`, float32 ``scale`` ``[out]``, and int32 ``plan``,
which says how activations become columns::

    in, columns, high, wides, lows, usual (float), smooth?, static?
    limit [in] (float), mask [in], wide [wides], low [lows], source [columns - in],
    piece [columns - in], smooth [in] (float), step [1] (float)
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lutra.kernels.ops  # noqa: F401  (defines the op namespace)
from lutra.errors import KernelError
from lutra.formats.flat import FlatWeight, words_of
from lutra.kernels.cpu.linear import ACTIVATIONS, LONGEST, _is_plain
from lutra.kernels.cpu.linear import native as planes_native
from lutra.kernels.flat import FlatKernel, FlatSpec
from lutra.kernels.flat.lowering import LOW, lower

TILE_COLUMNS, TILE_ROWS = 64, 16
HEADER = 8
#: Integers of activations pass through float32 and int32 on their way to digits.
LARGEST_LIMIT = 2**30
# The smallest number of tokens that a matrix unit multiplies faster, by bits (measured): 4 bits are
# unpacked in memory for it, otherwise in registers.
TILES_FROM = {8: 7, 4: 14}
# Levels of the kernels for bit planes that have none here.
NEAREST_LEVEL = {"avx512bw": "avx2", "neon": "portable"}


@cache
def native() -> Any:
    """The compiled extension, at the level that ``LUTRA_CPU_ISA`` names, else the best.

    Raises:
        ImportError: the extension was not built.
        KernelError: this machine or build does not have the level.
    """
    extension = planes_native()
    wanted = os.environ.get("LUTRA_CPU_ISA")
    if wanted:
        try:
            extension.set_flat_level(NEAREST_LEVEL.get(wanted, wanted))
        except ValueError as error:
            raise KernelError(
                f"LUTRA_CPU_ISA={wanted}: {error}; there are {', '.join(extension.flat_levels())}"
            ) from None
    return extension


def prepare(weight: FlatWeight) -> list[Tensor]:
    """Data, scale and plan of a layer.

    Raises:
        KernelError: ranges of channels, or a static step, that cannot be meant.
    """
    limit_I = weight.limit.to(torch.int32).contiguous()
    if not 1 <= int(limit_I.min()) <= int(limit_I.max()) <= LARGEST_LIMIT:
        raise KernelError(
            f"input_limit must lie between 1 and {LARGEST_LIMIT}, not between {int(limit_I.min())} "
            f"and {int(limit_I.max())}; the checkpoint is damaged"
        )
    if weight.step is not None and not (torch.isfinite(weight.step) & (weight.step > 0)).all():
        raise KernelError(
            f"input_step must be a positive number, not {float(weight.step)}; the checkpoint is "
            "damaged"
        )
    empty = FlatWeight(
        weight.digits[:, :0], weight.scale[:0], weight.limit, weight.source, weight.bits,
        weight.in_features,
    )  # fmt: skip
    # Only the columns: the digits themselves are put in place without a copy as wide integers.
    # Without merging, because a sum of 4-bit digits would need more than 4 bits.
    lowered = lower(empty, digit_bits=8, tile=TILE_COLUMNS, merge=False)
    plan = _plan(weight, limit_I, lowered.source, lowered.piece, lowered.origin, lowered.high)
    tiles = -(-weight.out_features // TILE_ROWS) * lowered.columns // TILE_COLUMNS
    data = native().allocate(tiles * TILE_COLUMNS * TILE_ROWS * weight.bits // 8)
    scale = weight.scale.to(torch.float32).contiguous().clone()
    prepared = [data, scale, plan]
    digits, origin = weight.digits.contiguous(), lowered.origin.contiguous()
    native().flat_prepare(
        *_layer(prepared, weight.out_features, weight.bits), digits.data_ptr(), digits.shape[2],
        origin.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return prepared


def _plan(
    weight: FlatWeight, limit_I: Tensor, source_C: Tensor, piece_C: Tensor, origin_C: Tensor,
    high: int,
) -> Tensor:
    in_features = weight.in_features
    usual = int(limit_I.mode().values)
    wide = (limit_I != usual).nonzero().flatten()
    first = slice(high, high + in_features)
    low = (piece_C[first] == LOW).nonzero().flatten()
    # A first column that is neither a low digit nor piece 0 does not exist, see lowering.
    source_C = torch.where(origin_C < 0, -1, source_C)
    others = torch.cat([torch.arange(high), torch.arange(high + in_features, len(source_C))])
    mask_I = torch.where(limit_I == usual, 0x7FFFFFFF, 0)
    header = torch.tensor([
        in_features, len(source_C), high, len(wide), len(low), 0, weight.smooth is not None,
        weight.step is not None,
    ])  # fmt: skip
    header = header.to(torch.int32)
    header[5:6].view(torch.float32).fill_(usual)
    parts = [
        header, limit_I.to(torch.float32).view(torch.int32), mask_I, wide, low, source_C[others],
        piece_C[others],
    ]  # fmt: skip
    for extra in (weight.smooth, weight.step):
        if extra is not None:
            parts.append(extra.to(torch.float32).contiguous().view(torch.int32))
    return torch.cat([p.to(torch.int32) for p in parts]).contiguous()


def _layer(prepared: list[Tensor], out_features: int, bits: int) -> tuple[int, ...]:
    """What every function of the extension begins with."""
    data, scale, plan = prepared
    return (
        data.data_ptr(), data.numel(), scale.data_ptr(), plan.data_ptr(), plan.numel(),
        out_features, bits,
    )  # fmt: skip


def quantized(x_MI: Tensor, prepared: list[Tensor], out_features: int, bits: int) -> list[Tensor]:
    """What the kernel makes of activations: int8 ``[tokens, columns]``, the sums of each row with
    high columns counted 255 times (int32), and the steps (float32); for tests."""
    x_MI = x_MI.contiguous()
    rows = len(x_MI)
    columns = torch.empty((rows, int(prepared[2][1])), dtype=torch.int8)
    sums = torch.empty(rows, dtype=torch.int32)
    steps = torch.empty(rows, dtype=torch.float32)
    native().flat_quantize(
        *_layer(prepared, out_features, bits), x_MI.data_ptr(), ACTIVATIONS[x_MI.dtype],
        x_MI.shape[1], rows, columns.data_ptr(), sums.data_ptr(), steps.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return [columns, sums, steps]


library = torch.library.Library("lutra", "FRAGMENT")
library.define(
    "cpu_flat_linear(Tensor x, Tensor data, Tensor scale, Tensor plan, Tensor? bias, "
    "int out_features, int in_features, int bits) -> Tensor"
)


def _check(
    x: Tensor, data: Tensor, scale: Tensor, plan: Tensor, bias: Tensor | None, out_features: int,
    in_features: int, bits: int,
) -> None:
    """Everything that the extension does not check itself, without touching data.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"activations {tuple(x.shape)} do not end in the {in_features} features of the weight"
        )
    if x.dtype not in ACTIVATIONS:
        raise ValueError(f"activations must be float32, float16 or bfloat16, not {x.dtype}")
    if not (bits in (4, 8) and 1 <= out_features <= LONGEST and 1 <= in_features <= LONGEST):
        raise ValueError(f"impossible weight: {bits} bits of {out_features} x {in_features}")
    for name, tensor, dtype in (
        ("data", data, torch.uint8), ("scale", scale, torch.float32), ("plan", plan, torch.int32),
    ):  # fmt: skip
        if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"prepared {name} must be a contiguous vector of {dtype}, not "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    if scale.numel() != out_features:
        raise ValueError(f"{scale.numel()} scales for {out_features} outputs")
    if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be {out_features} floating-point numbers, not {tuple(bias.shape)} of "
            f"{bias.dtype}"
        )
    for part in (data, scale, plan, bias):
        if part is not None and part.device != x.device:
            raise ValueError(f"activations are on {x.device}, the weight on {part.device}")


@torch.library.register_fake("lutra::cpu_flat_linear", lib=library)
def _(
    x: Tensor, data: Tensor, scale: Tensor, plan: Tensor, bias: Tensor | None, out_features: int,
    in_features: int, bits: int,
) -> Tensor:
    _check(x, data, scale, plan, bias, out_features, in_features, bits)
    return x.new_empty((*x.shape[:-1], out_features))


def cpu_flat_linear(
    x: Tensor, data: Tensor, scale: Tensor, plan: Tensor, bias: Tensor | None, out_features: int,
    in_features: int, bits: int,
) -> Tensor:
    """``x`` ``[..., in]`` times a prepared layer, ``[..., out]`` in the dtype of ``x``."""
    _check(x, data, scale, plan, bias, out_features, in_features, bits)
    if plan.numel() < HEADER or int(plan[0]) != in_features:
        raise ValueError(f"the plan is not that of {in_features} inputs")
    return _run(x, [data, scale, plan], bias, out_features, bits)


def _run(
    x: Tensor, prepared: list[Tensor], bias: Tensor | None, out_features: int, bits: int
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features
    stride = x.shape[-1]
    if not x.is_contiguous():
        x = x.reshape(-1, stride)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    native().flat_linear(
        *_layer(prepared, out_features, bits), x.data_ptr(), ACTIVATIONS[x.dtype], stride, rows,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), TILES_FROM[bits],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


library.impl("cpu_flat_linear", cpu_flat_linear, "CPU")


class CpuFlatKernel(FlatKernel):
    """8-bit integer products on every x86-64 instruction set, plain C++ elsewhere."""

    name = "cpu-flat"

    def supports(self, spec: FlatSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU, not on {spec.device.type}"
        if spec.dtype not in ACTIVATIONS:
            return f"takes float32, float16 or bfloat16 activations, not {spec.dtype}"
        if spec.bits not in (4, 8):
            return f"takes digits of 4 or 8 bits, not {spec.bits}"
        return None

    def prepare(self, weight: FlatWeight, spec: FlatSpec) -> list[Tensor]:
        """Data, scale and plan; see the module's docstring.

        Raises:
            KernelError: ranges of channels, or a static step, that cannot be meant.
        """
        return prepare(weight)

    def restore(self, prepared: list[Tensor], spec: FlatSpec) -> Tensor:
        words = words_of(spec.columns, spec.bits)
        digits = torch.empty((1, spec.out_features, words), dtype=torch.int32)
        native().flat_restore(
            *_layer(prepared, spec.out_features, spec.bits), digits.data_ptr(), words,
            spec.columns, torch.get_num_threads(),
        )  # fmt: skip
        return digits

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        if _is_plain(x) and x.dtype in ACTIVATIONS and x.shape[-1:] == (spec.in_features,):
            return _run(x, prepared, bias, spec.out_features, spec.bits)
        return torch.ops.lutra.cpu_flat_linear(
            x, *prepared, bias, spec.out_features, spec.in_features, spec.bits
        )
