"""The CPU kernels as ops and as choices of the dispatcher.

Few rows of activations are multiplied through lookup tables (`kernels.h`), at the speed at which
memory gives the planes: the weights are never unpacked. From :func:`most_rows_by_tables` rows on,
blocks of rows are decoded once to dense bfloat16 or float32 and multiplied by torch.

Two numerics, by name:

- ``cpu``: 16-bit tables, relative error of the output about 2.5e-5; the default.
- ``cpu-fast``: 8-bit tables, about 0.6 %, the error of kernels that round activations to 8 bits.
  Where memory is the limit it is no faster, so it must be asked for (``LUTRA_KERNEL=cpu-fast``).

In both, larger batches of bfloat16 activations round the weights to bfloat16, as a dense bfloat16
model would. Larger batches of other activations keep the precision of ``cpu`` (bfloat16 terms for
what rounding leaves, or float32), and with ``cpu-fast`` on a matrix unit are rounded to bfloat16.

Where a layer's tensors lie: ``prepare`` gives flat tensors, planes int32, scale and offset in their
stored dtype, permuted for the instruction set in use and padded to whole tiles of 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import lutra.kernels.ops  # noqa: F401  (defines the op namespace)
from lutra.errors import KernelError
from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row
from lutra.kernels.dispatch import Kernel, LinearSpec

TILE_ROWS = 16
BLOCK_ROWS = 64  # whole blocks of every level's layout
ACTIVATIONS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # codes of kernels.h
LONGEST = 2**31 - 1  # the kernels index features and rows with 32 bits

# Decoded weights are multiplied in pieces of about this many bytes, so that they are still in the
# cache when torch reads them.
DECODED_BYTES = 4 << 20

# Levels of the kernels for flattened layers that have none of that name here.
NEAREST_LEVEL = {"amx": "avx512vnni", "avxvnni": "avx2"}


@cache
def native() -> Any:
    """The compiled extension, at the level that ``LUTRA_CPU_ISA`` names, else the best.

    Raises:
        ImportError: the extension was not built.
        KernelError: this machine or build does not have the level.
    """
    import os

    from lutra.kernels.cpu import _native

    wanted = os.environ.get("LUTRA_CPU_ISA")
    if wanted:
        try:
            _native.set_level(NEAREST_LEVEL.get(wanted, wanted))
        except ValueError as error:
            raise KernelError(f"LUTRA_CPU_ISA={wanted}: {error}") from None
    return _native


# Largest batches for lookup tables by bits; the fifth number is for all above 4, whose decoding
# takes two lookups and is slow. Measured with 4096 x 4096, groups of 128 (docs/performance-cpu.md).
MOST_ROWS_BY_TABLES = {
    # (matrix unit, numerics): a matrix unit multiplies decoded weights in one pass, in three where
    # activations of more than bfloat16's precision must keep it, or torch multiplies them.
    ("tiles", "exact"): (22, 14, 11, 9, 16),
    ("tiles", "fast"): (48, 28, 20, 15, 24),
    ("three tiles", "exact"): (96, 40, 22, 16, 24),
    ("torch", "exact"): (48, 32, 24, 20, 16),
    ("torch", "fast"): (96, 64, 48, 40, 24),
}


@cache
def most_rows_by_tables(bits: int, dtype: torch.dtype, fast: bool) -> int:
    """Largest batch that lookup tables multiply at least as fast as decoding does (measured)."""
    if not native().has_matrix_unit():
        decoded = "torch"
    elif fast or dtype == torch.bfloat16:
        decoded = "tiles"
    else:
        decoded = "three tiles"
    rows = MOST_ROWS_BY_TABLES[decoded, "fast" if fast else "exact"]
    return rows[min(bits, len(rows)) - 1]


def padded_rows(out_features: int) -> int:
    """Rows of a prepared weight: whole tiles."""
    return -(-out_features // TILE_ROWS) * TILE_ROWS


def _allocate(sizes: tuple[int, ...], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Flat tensors beside each other in one block for weights."""
    bytes_of = [n * d.itemsize for n, d in zip(sizes, dtypes, strict=True)]
    starts = [0]
    for n in bytes_of:
        starts.append(starts[-1] + -(-n // 64) * 64)
    block = native().allocate(starts[-1])
    return [
        block[start : start + n].view(dtype)
        for start, n, dtype in zip(starts, bytes_of, dtypes, strict=False)
    ]


library = torch.library.Library("lutra", "FRAGMENT")
library.define(
    "cpu_linear(Tensor x, Tensor planes, Tensor scale, Tensor offset, Tensor? bias, "
    "int out_features, int in_features, int bits, int group_size, bool uniform, bool fast) "
    "-> Tensor"
)


def _check(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None,
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool,
) -> None:
    """Everything that the extension relies on, without touching data.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"activations {tuple(x.shape)} do not end in the {in_features} features of the weight"
        )
    if x.dtype not in ACTIVATIONS:
        raise ValueError(f"activations must be float32, float16 or bfloat16, not {x.dtype}")
    if not (1 <= bits <= 8 and 1 <= out_features <= LONGEST and 1 <= in_features <= LONGEST):
        raise ValueError(f"impossible weight: {bits} planes of {out_features} x {in_features}")
    if not 1 <= group_size <= LONGEST or (group_size % 32 and group_size < in_features):
        raise ValueError(f"group size must be a multiple of 32 or span the row, not {group_size}")
    rows = padded_rows(out_features)
    per_plane = rows * groups_per_row(in_features, group_size)
    stored = 1 if uniform else bits
    for name, tensor, numel in (
        ("planes", planes, rows * words_per_row(in_features) * bits),
        ("scale", scale, per_plane * stored),
        ("offset", offset, per_plane),
    ):
        dtypes = (torch.int32,) if name == "planes" else tuple(ACTIVATIONS)
        if tensor.dtype not in dtypes or tensor.numel() != numel or not tensor.is_contiguous():
            raise ValueError(
                f"prepared {name} must be {numel} contiguous numbers of {dtypes}, not "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
    if bias is not None and (bias.shape != (out_features,) or not bias.is_floating_point()):
        raise ValueError(
            f"bias must be {out_features} floating-point numbers, not {tuple(bias.shape)} of "
            f"{bias.dtype}"
        )
    for part in (planes, scale, offset, bias):
        if part is not None and part.device != x.device:
            raise ValueError(f"activations are on {x.device}, the weight on {part.device}")


@torch.library.register_fake("lutra::cpu_linear", lib=library)
def _(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None,
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool, fast: bool,
) -> Tensor:
    _check(x, planes, scale, offset, bias, out_features, in_features, bits, group_size, uniform)
    return x.new_empty((*x.shape[:-1], out_features))


def cpu_linear(
    x: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None,
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool, fast: bool,
) -> Tensor:
    """``x`` ``[..., in]`` times a prepared weight, ``[..., out]`` in the dtype of ``x``."""
    _check(x, planes, scale, offset, bias, out_features, in_features, bits, group_size, uniform)
    layer = (
        planes.data_ptr(), scale.data_ptr(), offset.data_ptr(), ACTIVATIONS[scale.dtype],
        ACTIVATIONS[offset.dtype], out_features, in_features, bits, group_size, uniform,
    )
    return _run(x, layer, bias, fast)


def _is_plain(x: Tensor) -> bool:
    """Whether ``x`` may skip the dispatcher, which takes longer than a small layer's product: an
    ordinary tensor on the CPU that nothing traces, records or differentiates."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _run(x: Tensor, layer: tuple[Any, ...], bias: Tensor | None, fast: bool) -> Tensor:
    out_features, in_features, bits = layer[5:8]
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features
    if rows == 0:
        return y
    by_tables = rows <= most_rows_by_tables(bits, x.dtype, fast)
    if not by_tables and not native().has_matrix_unit():
        _multiply_decoded(x.reshape(-1, in_features), y.view(rows, out_features), bias, layer)
        return y
    stride = in_features
    if not x.is_contiguous():
        x = x.reshape(-1, in_features)
        x = x if x.stride(1) == 1 else x.contiguous()
        stride = x.stride(0)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    # Rounding bfloat16 activations to bfloat16 loses nothing, so only others need a second term.
    multiply, numerics = (
        (native().linear, fast)
        if by_tables
        else (native().linear_by_tiles, not fast and x.dtype != torch.bfloat16)
    )
    multiply(
        *layer, numerics, x.data_ptr(), ACTIVATIONS[x.dtype], stride, rows,
        0 if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )
    return y


def _decoded_pieces(layer: tuple[Any, ...], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Dense rows of a weight, piece by piece ``(first row, [rows, in])``, in the same memory."""
    out_features, in_features = layer[5:7]
    columns = words_per_row(in_features) * 32
    step = max(BLOCK_ROWS, DECODED_BYTES // (columns * dtype.itemsize) // BLOCK_ROWS * BLOCK_ROWS)
    step = min(step, -(-out_features // BLOCK_ROWS) * BLOCK_ROWS)
    piece = torch.empty((step, columns), dtype=dtype, device="cpu")
    threads = torch.get_num_threads()
    for start in range(0, out_features, step):
        count = min(step, out_features - start)
        native().decode(*layer, start, count, ACTIVATIONS[dtype], piece.data_ptr(), threads)
        yield start, piece[:count, :in_features]


def _multiply_decoded(
    x_MI: Tensor, y_MO: Tensor, bias: Tensor | None, layer: tuple[Any, ...]
) -> None:
    """Decode the weight piece by piece and let torch multiply; float16 goes through float32."""
    dtype = torch.bfloat16 if x_MI.dtype == torch.bfloat16 else torch.float32
    x_MI = x_MI.to(dtype)
    for start, weight in _decoded_pieces(layer, dtype):
        rows = slice(start, start + len(weight))
        part = None if bias is None else bias[rows].to(dtype)
        y_MO[:, rows] = torch.nn.functional.linear(x_MI, weight, part)


library.impl("cpu_linear", cpu_linear, "CPU")

# The gradient for the activations, so that adapters can be trained around a packed layer.
library.define(
    "cpu_linear_backward(Tensor grad, Tensor planes, Tensor scale, Tensor offset, "
    "int out_features, int in_features, int bits, int group_size, bool uniform) -> Tensor"
)


@torch.library.register_fake("lutra::cpu_linear_backward", lib=library)
def _(
    grad: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, out_features: int,
    in_features: int, bits: int, group_size: int, uniform: bool,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def cpu_linear_backward(
    grad: Tensor, planes: Tensor, scale: Tensor, offset: Tensor, out_features: int,
    in_features: int, bits: int, group_size: int, uniform: bool,
) -> Tensor:
    """``grad`` ``[..., out]`` times the weight itself: the gradient ``[..., in]`` of the input."""
    x = grad.new_empty((*grad.shape[:-1], in_features))
    if grad.shape[-1:] != (out_features,):
        raise ValueError(f"gradient {tuple(grad.shape)} does not end in {out_features} features")
    _check(x, planes, scale, offset, None, out_features, in_features, bits, group_size, uniform)
    layer = (
        planes.data_ptr(), scale.data_ptr(), offset.data_ptr(), ACTIVATIONS[scale.dtype],
        ACTIVATIONS[offset.dtype], out_features, in_features, bits, group_size, uniform,
    )
    total_MI = torch.zeros((x.numel() // in_features, in_features), dtype=torch.float32)
    grad_MO = grad.reshape(-1, out_features).to(torch.float32)
    for start, weight in _decoded_pieces(layer, torch.float32):
        total_MI += grad_MO[:, start : start + len(weight)] @ weight
    return total_MI.to(grad.dtype).view(x.shape)


library.impl("cpu_linear_backward", cpu_linear_backward, "CPU")


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.sizes, ctx.biased = inputs[5:10], inputs[4] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x = torch.ops.lutra.cpu_linear_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.biased else None
    return (x, None, None, None, bias, *[None] * 6)


torch.library.register_autograd(
    "lutra::cpu_linear", _backward, setup_context=_save_for_backward, lib=library
)


class CpuKernel(Kernel):
    """Lookup tables for small batches, decoded weights for large ones; see the module's docstring.

    Args:
        fast: 8-bit instead of 16-bit tables.
    """

    def __init__(self, fast: bool) -> None:
        self.fast = fast
        self.name = "cpu-fast" if fast else "cpu"

    def supports(self, spec: LinearSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"runs on the CPU, not on {spec.device.type}"
        if spec.dtype not in ACTIVATIONS:
            return f"takes float32, float16 or bfloat16 activations, not {spec.dtype}"
        if not 1 <= spec.bits <= 8:
            return f"takes 1 to 8 planes, not {spec.bits}"
        if spec.group_size % 32 and spec.group_size < spec.in_features:
            return f"takes groups of a multiple of 32 inputs, not {spec.group_size}"
        return None

    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        """Flat planes, scale and offset in the layout of ``kernels.h``.

        Raises:
            KernelError: scales or offsets are not float16, bfloat16 or float32.
        """
        return self._prepare([weight], spec)

    def prepare_joint(self, weights: Sequence[BitPlanes], spec: LinearSpec) -> list[Tensor]:
        """As :meth:`prepare`; weights of whole blocks of rows need not be put together before."""
        whole_blocks = all(w.out_features % BLOCK_ROWS == 0 for w in weights[:-1])
        dtypes = {(w.scale.dtype, w.offset.dtype) for w in weights}
        if whole_blocks and len(dtypes) == 1:
            return self._prepare(weights, spec)
        return super().prepare_joint(weights, spec)

    def _prepare(self, weights: Sequence[BitPlanes], spec: LinearSpec) -> list[Tensor]:
        """Blocks of rows are outermost in the layout, so weights of whole blocks just follow."""
        for name, tensor in (("scales", weights[0].scale), ("offsets", weights[0].offset)):
            if tensor.dtype not in ACTIVATIONS:
                raise KernelError(
                    f"the CPU kernel takes float16, bfloat16 or float32 {name}, not "
                    f"{tensor.dtype}; store them as one of these"
                )
        groups, scales = weights[0].offset.shape[1], weights[0].scale.shape[0]
        per_row = (words_per_row(spec.in_features) * spec.bits, groups * scales, groups)
        rows = padded_rows(spec.out_features)
        first = weights[0]
        dtypes = [t.dtype for t in (first.planes, first.scale, first.offset)]
        prepared = _allocate((rows * per_row[0], rows * per_row[1], rows * per_row[2]), dtypes)
        row, threads = 0, torch.get_num_threads()
        for weight in weights:
            stored = [t.contiguous() for t in (weight.planes, weight.scale, weight.offset)]
            part = [t[row * n :] for t, n in zip(prepared, per_row, strict=True)]
            part_spec = replace(spec, out_features=weight.out_features)
            native().prepare(
                *self._layer(part, part_spec), *(t.data_ptr() for t in stored), threads
            )
            row += weight.out_features
        return prepared

    def restore(self, prepared: list[Tensor], spec: LinearSpec) -> BitPlanes:
        words = words_per_row(spec.in_features)
        groups = groups_per_row(spec.in_features, spec.group_size)
        scales = 1 if spec.uniform else spec.bits
        shapes = (
            (spec.bits, spec.out_features, words),
            (scales, spec.out_features, groups),
            (spec.out_features, groups),
        )
        planes, scale, offset = (
            torch.empty(s, dtype=t.dtype, device=t.device)
            for s, t in zip(shapes, prepared, strict=True)
        )
        native().restore(
            *self._layer(prepared, spec), planes.data_ptr(), scale.data_ptr(), offset.data_ptr(),
            torch.get_num_threads(),
        )
        return BitPlanes(planes, scale, offset, spec.in_features, spec.group_size)

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        if _is_plain(x) and x.dtype in ACTIVATIONS and x.shape[-1:] == (spec.in_features,):
            return _run(x, self._layer(prepared, spec), bias, self.fast)
        return torch.ops.lutra.cpu_linear(
            x, *prepared, bias, spec.out_features, spec.in_features, spec.bits, spec.group_size,
            spec.uniform, self.fast,
        )

    @staticmethod
    def _layer(prepared: list[Tensor], spec: LinearSpec) -> tuple[Any, ...]:
        planes, scale, offset = prepared
        return (
            planes.data_ptr(), scale.data_ptr(), offset.data_ptr(), ACTIVATIONS[scale.dtype],
            ACTIVATIONS[offset.dtype], spec.out_features, spec.in_features, spec.bits,
            spec.group_size, spec.uniform,
        )
