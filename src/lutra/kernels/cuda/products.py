"""Run a plan: fill in the arguments of its kernels and launch them.

The structs mirror ``struct Arguments`` of each source.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError, ResourceError
from lutra.kernels.cuda.code_batch_plans import (
    CHUNK_SLICES,
    CodeBatchPlan,
    code_batch_blocks,
    code_batch_row_blocks,
    code_batch_shared_bytes,
)
from lutra.kernels.cuda.launch import (
    Card,
    Function,
    card,
    function,
    half_boxes,
    word_boxes,
)
from lutra.kernels.cuda.layout import TILE_ROWS, WHOLE_ITEMS, Layout, scales_size
from lutra.kernels.cuda.place_batch_plans import (
    PlaceBatchPlan,
    place_batch_shared_bytes,
    place_batch_sums,
    place_batch_work,
    places_bytes,
    places_grid,
    places_held,
)
from lutra.kernels.cuda.plans import (
    DENSE_WORKSPACE_BYTES,
    CodePlan,
    DensePlan,
    FewPlan,
    FieldPlan,
    Plan,
    code_plans,
    code_shared_bytes,
    has_steps,
    inputs_bytes,
)
from lutra.kernels.cuda.prefill_plans import (
    PrefillPlan,
    arrange_blocks,
    arrange_held,
    arrange_warps,
    arranged_bytes,
    prefill_shared_bytes,
    prefill_work,
    shared_sums,
)
from lutra.kernels.cuda.sparse_plans import SparsePlan, sparse_sizes
from lutra.kernels.cuda.stream_plans import StreamPlan, stream_sizes
from lutra.kernels.cuda.tuning import choose


class _FewArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("y_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("items", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("items_per_group", ctypes.c_int),
        ("panel_items", ctypes.c_int),
        ("k_warps", ctypes.c_int),
    ]


class _ArrangeArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("arranged", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("x_stride", ctypes.c_longlong),
        ("tokens", ctypes.c_int),
        ("in_features", ctypes.c_int),
        ("slices", ctypes.c_int),
    ]


class _PrefillArrangeArguments(ctypes.Structure):
    _fields_ = [*_ArrangeArguments._fields_, ("flags", ctypes.c_int)]


class _FieldArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("arranged", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("items", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("items_per_group", ctypes.c_int),
    ]


class _CodeArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_ulonglong * 16),
        ("scales", ctypes.c_ulonglong * 16),
        ("steps", ctypes.c_ulonglong * 16),
        ("scales_at", ctypes.c_void_p),
        *_FieldArguments._fields_[2:],
        ("row_blocks", ctypes.c_int),
        ("token_tiles", ctypes.c_int),
        ("near_tiles", ctypes.c_int),
        ("padding", ctypes.c_byte * 44),  # the size is a multiple of the maps' alignment, 64
    ]


class _PrefillArguments(ctypes.Structure):
    _fields_ = [
        *_CodeArguments._fields_[:3],
        ("results", ctypes.c_ulonglong * 16),
        *_CodeArguments._fields_[3:-1],
        ("whole", ctypes.c_int),
        ("share", ctypes.c_int),
        ("extra", ctypes.c_int),
        ("boxes", ctypes.c_int),
        ("partial", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 8),
    ]


class _SparseArguments(ctypes.Structure):
    _fields_ = [
        *_FewArguments._fields_[:-2],
        ("k_warps", ctypes.c_int),
        ("x_bytes", ctypes.c_int),
        ("sums_offset", ctypes.c_int),
    ]


class _StreamArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_ulonglong * 16),
        ("scales", ctypes.c_ulonglong * 16),
        *_FewArguments._fields_[2:12],
        ("items_per_group", ctypes.c_int),
        ("sums_offset", ctypes.c_int),
        ("padding", ctypes.c_byte * 60),  # the size is a multiple of the maps' alignment, 64
    ]


class _CodeBatchArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_ulonglong * 16),
        ("scales", ctypes.c_ulonglong * 16),
        *_FieldArguments._fields_[2:],
        ("row_blocks", ctypes.c_int),
        ("padding", ctypes.c_byte * 60),  # the size is a multiple of the maps' alignment, 64
    ]


class _Results(ctypes.Structure):
    _fields_ = [
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_stride", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("tokens", ctypes.c_int),
    ]


class _Shares(ctypes.Structure):
    _fields_ = [
        ("share", ctypes.c_int),
        ("extra", ctypes.c_int),
        ("partial", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
    ]


class _PlaceBatchArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_ulonglong * 16),
        ("scales", ctypes.c_ulonglong * 16),
        ("arranged", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("results", _Results),
        ("tiles", ctypes.c_int),
        ("items", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("items_per_group", ctypes.c_int),
        ("shares", _Shares),
        ("padding", ctypes.c_byte * 40),  # the size is a multiple of the maps' alignment, 64
    ]


class _DequantizeArguments(ctypes.Structure):
    _fields_ = [
        ("planes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("in_features", ctypes.c_int),
        ("tile_begin", ctypes.c_int),
        ("tile_end", ctypes.c_int),
        ("items", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("items_per_group", ctypes.c_int),
    ]


def format_defines(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> dict[str, int]:
    """Compile-time parameters that every kernel takes."""
    return {
        "BITS": layout.bits,
        "GROUP": layout.group,
        "UNIFORM": int(uniform),
        "SCALE_FLOAT": int(scale == torch.float32),
        "X_BF16": int(x == torch.bfloat16),
    }


def few_defines(
    plan: FewPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> dict[str, int]:
    """Compile-time parameters of `binary_linear.cu`, `byte_linear.cu` and `exact_linear.cu`."""
    both = format_defines(layout, uniform, scale, x) | {"TOKENS": plan.tokens}
    if plan.kernel == "exact_linear":
        return both
    whole_row = layout.group == WHOLE_ITEMS and layout.groups == 1
    whole_row = whole_row and plan.tokens <= (8 if layout.bits <= 4 else 2)  # registers
    return both | {
        "WARPS": plan.warps, "STAGES": plan.stages, "BLOCKS": plan.blocks, "EARLY": plan.early,
        "WHOLE_ROW": int(whole_row), "CUT": plan.cut,
    }


def field_defines(
    plan: FieldPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time parameters of `arrange.cu` and `field_linear.cu`."""
    both = format_defines(layout, uniform, scale, x) | {"TOKENS": plan.tokens}
    return both | {"SUM_OPERANDS": 0}, both | {
        "WARPGROUPS": plan.warpgroups, "STAGES": plan.stages, "AHEAD": plan.ahead,
        "BLOCKS": plan.blocks,
    }


def code_defines(
    plan: CodePlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time parameters of `arrange.cu` and `code_linear.cu`."""
    one_plane = layout.bits == 1  # levels of one plane are uniform
    both = format_defines(layout, uniform or one_plane, scale, x) | {"TOKENS": plan.tokens}
    return both | {"SUM_OPERANDS": 1}, both | {
        "WARPGROUPS": plan.warpgroups, "STAGES": plan.stages, "AHEAD": plan.ahead,
        "BLOCKS": plan.blocks,
    }


def sparse_defines(
    plan: SparsePlan, layout: Layout, scale: torch.dtype, x: torch.dtype
) -> dict[str, int]:
    """Compile-time parameters of `sparse_linear.cu`."""
    return format_defines(layout, False, scale, x) | {
        "TILES": plan.tiles, "WARPS": plan.warps, "STAGES": plan.stages, "PANELS": plan.panels,
    }


def stream_defines(
    plan: StreamPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> dict[str, int]:
    """Compile-time parameters of `stream_linear.cu`."""
    one_plane = layout.bits == 1  # levels of one plane are uniform
    return format_defines(layout, uniform or one_plane, scale, x) | {
        "TOKENS": plan.tokens, "TILES": plan.tiles, "WARPS": plan.warps, "K_WARPS": plan.k_warps,
        "STAGES": plan.stages, "EARLY": plan.early, "CHUNKS": plan.chunks,
    }


def code_batch_defines(
    plan: CodeBatchPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time parameters of `prefill_arrange.cu` and `code_batch.cu`."""
    one_plane = layout.bits == 1  # levels of one plane are uniform
    both = format_defines(layout, uniform or one_plane, scale, x) | {"TOKENS": plan.tokens}
    return both | {"HELD": arrange_held(layout)}, both | {
        "GROUPS": plan.groups, "K_GROUPS": plan.k_groups, "TALL": plan.tall,
        "STAGES": plan.stages, "SPLIT": int(plan.split),
    }


def place_batch_defines(
    plan: PlaceBatchPlan, layout: Layout, scale: torch.dtype, x: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time parameters of `place_arrange.cu` and `place_batch.cu`."""
    both = format_defines(layout, False, scale, x) | {"TOKENS": plan.tokens}
    return both | {"HELD": places_held(layout)}, both | {
        "GROUPS": plan.groups, "TALL": plan.tall, "STAGES": plan.stages,
    }


def prefill_defines(
    plan: PrefillPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time parameters of `prefill_arrange.cu` and `code_prefill.cu`."""
    one_plane = layout.bits == 1  # levels of one plane are uniform
    both = format_defines(layout, uniform or one_plane, scale, x) | {"TOKENS": plan.tokens}
    return both | {"HELD": arrange_held(layout)}, both | {
        "GROUPS": plan.groups, "STAGES": plan.stages, "CLUSTER": plan.cluster,
        "SHARES": plan.shares,
    }


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _few_function(
    plan: FewPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, device: Card
) -> Function:
    return function(
        plan.kernel, few_defines(plan, layout, uniform, scale, x), device, plan.shared_bytes
    )


def few_linear(
    plan: FewPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for up to ``plan.tokens`` rows of x; unit inner strides."""
    device = card(x.device.index)
    kernel = _few_function(plan, layout, uniform, scales.dtype, x.dtype, device)
    arguments = _FewArguments(
        planes.data_ptr(), scales.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(),
        x.stride(0), y.stride(0), layout.rows, layout.inputs, x.shape[0], layout.tiles,
        layout.items, layout.groups, layout.items_per_group, plan.panel_items, plan.k_warps,
    )
    kernel(arguments, (plan.grid, 1, 1), plan.warps * 32)


@cache
def _sparse_function(
    plan: SparsePlan, layout: Layout, scale: torch.dtype, x: torch.dtype, device: Card
) -> Function:
    shared = sparse_sizes(plan, layout).shared_bytes
    return function("sparse_linear", sparse_defines(plan, layout, scale, x), device, shared)


def sparse_linear(
    plan: SparsePlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout,
) -> None:
    """``y = x @ W.T + bias`` for up to ``plan.tokens`` rows of x; free levels of 2 to 4 bits."""
    kernel = _sparse_function(plan, layout, scales.dtype, x.dtype, card(x.device.index))
    sizes = sparse_sizes(plan, layout)
    arguments = _SparseArguments(
        planes.data_ptr(), scales.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(),
        x.stride(0), y.stride(0), layout.rows, layout.inputs, x.shape[0], layout.tiles,
        layout.items, layout.groups, layout.items_per_group, plan.k_warps, sizes.x_bytes,
        sizes.sums_offset,
    )
    kernel(arguments, (plan.cluster * plan.clusters, 1, 1), plan.warps * 32, plan.cluster)


@cache
def _stream_function(
    plan: StreamPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype,
    device: Card,
) -> Function:
    shared = stream_sizes(plan, layout).shared_bytes
    defines = stream_defines(plan, layout, uniform, scale, x)
    return function("stream_linear", defines, device, shared)


def stream_linear(
    plan: StreamPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for up to ``plan.tokens`` rows of x; unit inner strides."""
    kernel = _stream_function(
        plan, layout, uniform, scales.dtype, x.dtype, card(x.device.index)
    )
    arguments = _StreamArguments(
        *_weight_boxes(plan.tiles, planes, scales, layout),
        x.data_ptr(), _pointer(bias), y.data_ptr(), x.stride(0), y.stride(0), layout.rows,
        layout.inputs, x.shape[0], layout.tiles, layout.items, layout.items_per_group,
        stream_sizes(plan, layout).sums_offset,
    )
    kernel(arguments, (plan.cluster * plan.clusters, 1, 1), plan.threads, plan.cluster)


def _check_steps(scales: Tensor, layout: Layout) -> None:
    if scales.numel() == scales_size(layout):
        raise KernelError(
            "this weight was prepared without the steps of its levels, which products of more "
            "than a few tokens need; prepare it with CudaKernel.prepare"
        )


@cache
def _field_functions(
    plan: FieldPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype,
    device: Card,
) -> tuple[Function, Function]:
    arrange, main = field_defines(plan, layout, uniform, scale, x)
    return (
        function("arrange", arrange, device, inputs_bytes(layout)),
        function("field_linear", main, device, plan.shared_bytes),
    )


def _arrange(
    kernel: Function, x: Tensor, arranged: Tensor, factors: Tensor, layout: Layout
) -> None:
    """Launch `arrange.cu`; few tokens are spread over clusters of blocks."""
    parts = 1 if factors.numel() > 16 else min(8, layout.items)  # measured
    arguments = _ArrangeArguments(
        x.data_ptr(), arranged.data_ptr(), factors.data_ptr(), x.stride(0), x.shape[0],
        layout.inputs, layout.items * 2,
    )
    kernel(arguments, (factors.numel() * parts, 1, 1), 1024 if parts == 1 else 256, parts)


def field_linear(
    plan: FieldPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for some tens of rows of x on Hopper; groups of 128 and more."""
    tokens, slices = x.shape[0], layout.items * 2
    arrange, kernel = _field_functions(
        plan, layout, uniform, scales.dtype, x.dtype, card(x.device.index)
    )
    token_tiles = -(-tokens // plan.tokens)
    padded = plan.tokens * token_tiles
    arranged = torch.empty(slices * padded * 260, dtype=torch.uint8, device=x.device)
    factors = torch.empty(padded, dtype=torch.float32, device=x.device)
    _arrange(arrange, x, arranged, factors, layout)
    arguments = _FieldArguments(
        planes.data_ptr(), scales.data_ptr(), arranged.data_ptr(), factors.data_ptr(),
        _pointer(bias), y.data_ptr(), y.stride(0), layout.rows, tokens, layout.tiles,
        layout.items, layout.groups, layout.items_per_group,
    )
    kernel(
        arguments, (plan.cluster, plan.row_blocks, token_tiles), plan.warpgroups * 128,
        plan.cluster,
    )


@cache
def _code_functions(
    plan: CodePlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype,
    device: Card,
) -> tuple[Function, Function]:
    arrange, main = code_defines(plan, layout, uniform, scale, x)
    shared = code_shared_bytes(layout, uniform, plan.tokens, plan.warpgroups, plan.stages)
    return (
        function("arrange", arrange, device, inputs_bytes(layout)),
        function("code_linear", main, device, shared),
    )


def _boxes(
    tensor: Tensor, offset: int, columns: int, words: int, tiles: int, layout: Layout
) -> Any:
    """Description of ``columns`` times ``words`` words for each tile; boxes of ``tiles`` tiles."""
    return word_boxes(tensor.data_ptr() + offset, layout.tiles, columns * words, tiles, words)


def _weight_boxes(tiles: int, planes: Tensor, scales: Tensor, layout: Layout) -> tuple[Any, Any]:
    """Descriptions of planes and scales: boxes of ``tiles`` tiles, those of a block."""
    return (
        _boxes(planes, 0, layout.items * 2, layout.bits * 64, tiles, layout),
        _boxes(scales, 0, layout.groups, layout.slots * 8, tiles, layout),
    )


def _step_boxes(tiles: int, scales: Tensor, layout: Layout, uniform: bool) -> Any:
    """The same of the steps behind the scales; of the scales where there are none to be read."""
    steps = scales_size(layout) * 2 if has_steps(layout, uniform) else 0
    return _boxes(scales, steps, layout.groups, 8, tiles, layout)


def code_linear(
    plan: CodePlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for any number of rows of x on Hopper; up to 4 bits."""
    if has_steps(layout, uniform):
        _check_steps(scales, layout)
    tokens, slices = x.shape[0], layout.items * 2
    arrange, kernel = _code_functions(
        plan, layout, uniform, scales.dtype, x.dtype, card(x.device.index)
    )
    token_tiles = -(-tokens // plan.tokens)
    row_blocks = -(-layout.rows // (64 * plan.warpgroups))
    padded = plan.tokens * token_tiles
    sum_slices = -(-slices // 32)
    arranged = torch.empty(
        (slices + sum_slices) * padded * 256, dtype=torch.uint8, device=x.device
    )
    factors = torch.empty(padded, dtype=torch.float32, device=x.device)
    _arrange(arrange, x, arranged, factors, layout)

    arguments = _CodeArguments(
        *_weight_boxes(plan.warpgroups * 4, planes, scales, layout),
        _step_boxes(plan.warpgroups * 4, scales, layout, uniform),
        scales.data_ptr(), arranged.data_ptr(), factors.data_ptr(), _pointer(bias), y.data_ptr(),
        y.stride(0), layout.rows, tokens, layout.tiles, layout.items, layout.groups,
        layout.items_per_group, row_blocks, token_tiles, min(plan.near_tiles, token_tiles),
    )
    kernel(
        arguments, (plan.cluster * row_blocks * token_tiles, 1, 1), plan.warpgroups * 128 + 32,
        plan.cluster,
    )


@cache
def _prefill_functions(
    plan: PrefillPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype,
    device: Card,
) -> tuple[Function, Function]:
    arrange, main = prefill_defines(plan, layout, uniform, scale, x)
    shared = prefill_shared_bytes(plan, layout, uniform)
    return (
        function("prefill_arrange", arrange, device),
        function("code_prefill", main, device, shared),
    )


def _prefill_arrange(
    arrange: Function, x: Tensor, arranged: Tensor, factors: Tensor, padded: int, layout: Layout,
    flags: int = 0,
) -> None:
    """Put x in order for `code_prefill.cu` and `code_batch.cu`.

    Args:
        padded: tokens, filled up to whole tiles.
        flags: words behind the factors that are set to 0.
    """
    warps = arrange_warps(layout, padded)
    blocks = arrange_blocks(layout, warps)
    arrange(
        _PrefillArrangeArguments(
            x.data_ptr(), arranged.data_ptr(), factors.data_ptr(), x.stride(0), x.shape[0],
            layout.inputs, layout.items * 2, flags,
        ),
        (padded // 8 * blocks, 1, 1),
        warps * 32,
        blocks,
    )


def prefill_linear(
    plan: PrefillPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for a hundred rows of x and more on Hopper; up to 4 bits."""
    if has_steps(layout, uniform):
        _check_steps(scales, layout)
    device, tokens, half = card(x.device.index), x.shape[0], x.dtype == torch.float16
    arrange, kernel = _prefill_functions(plan, layout, uniform, scales.dtype, x.dtype, device)
    token_tiles, row_blocks = -(-tokens // plan.tokens), -(-layout.rows // plan.rows)
    padded = plan.tokens * token_tiles
    work = prefill_work(plan, layout, uniform, tokens, half, device)
    sums, flags = shared_sums(plan, work)
    size = arranged_bytes(layout, uniform, padded, half)
    arranged = torch.empty(size, dtype=torch.uint8, device=x.device)
    factors = torch.empty(padded + flags, dtype=torch.float32, device=x.device)
    partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    _prefill_arrange(arrange, x, arranged, factors, padded, layout, flags)
    boxed = y.data_ptr() % 16 == 0 and y.stride(0) % 8 == 0
    results = (
        half_boxes(
            y.data_ptr(), tokens, layout.rows, y.stride(0), plan.tokens // plan.shares, 64
        )
        if boxed else (ctypes.c_ulonglong * 16)()
    )
    arguments = _PrefillArguments(
        *_weight_boxes(plan.rows // 16, planes, scales, layout),
        _step_boxes(plan.rows // 16, scales, layout, uniform), results,
        scales.data_ptr(), arranged.data_ptr(), factors.data_ptr(), _pointer(bias), y.data_ptr(),
        y.stride(0), layout.rows, tokens, layout.tiles, layout.items, layout.groups,
        layout.items_per_group, row_blocks, token_tiles, min(plan.near_tiles, token_tiles),
        work.whole, work.share, work.extra, int(boxed), partial.data_ptr(),
        factors.data_ptr() + 4 * padded,
    )
    kernel(arguments, (work.clusters * plan.cluster, 1, 1), (plan.groups + 1) * 128, plan.cluster)


@cache
def _code_batch_functions(
    plan: CodeBatchPlan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype,
    device: Card,
) -> tuple[Function, Function]:
    arrange, main = code_batch_defines(plan, layout, uniform, scale, x)
    return (
        function("prefill_arrange", arrange, device),
        function("code_batch", main, device, code_batch_shared_bytes(plan, layout)),
    )


def code_batch_linear(
    plan: CodeBatchPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None,
    y: Tensor, layout: Layout, uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for up to ``plan.tokens`` rows of x on Hopper; uniform levels."""
    device, tokens = card(x.device.index), x.shape[0]
    arrange, kernel = _code_batch_functions(plan, layout, uniform, scales.dtype, x.dtype, device)
    size = arranged_bytes(layout, True, plan.tokens, x.dtype == torch.float16)
    arranged = torch.empty(size, dtype=torch.uint8, device=x.device)
    factors = torch.empty(plan.tokens, dtype=torch.float32, device=x.device)
    _prefill_arrange(arrange, x, arranged, factors, plan.tokens, layout)
    tiles, words = plan.rows // 16, layout.slots * 8
    arguments = _CodeBatchArguments(
        _boxes(planes, 0, layout.items * 2, layout.bits * 64, tiles, layout),
        word_boxes(
            scales.data_ptr(), layout.tiles, layout.groups * words, tiles, CHUNK_SLICES * words
        ),
        arranged.data_ptr(), factors.data_ptr(), _pointer(bias), y.data_ptr(), y.stride(0),
        layout.rows, tokens, layout.tiles, layout.items, layout.groups, layout.items_per_group,
        code_batch_row_blocks(plan, layout),
    )
    kernel(
        arguments, (code_batch_blocks(plan, layout, device), 1, 1), (plan.groups + 1) * 128,
        plan.cluster,
    )


@cache
def _place_batch_functions(
    plan: PlaceBatchPlan, layout: Layout, scale: torch.dtype, x: torch.dtype, device: Card
) -> tuple[Function, Function]:
    arrange, main = place_batch_defines(plan, layout, scale, x)
    return (
        function("place_arrange", arrange, device),
        function("place_batch", main, device, place_batch_shared_bytes(plan, layout)),
    )


def place_batch_linear(
    plan: PlaceBatchPlan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None,
    y: Tensor, layout: Layout,
) -> None:
    """``y = x @ W.T + bias`` for up to ``plan.tokens`` rows of x on Hopper; free levels."""
    tokens, slices = x.shape[0], layout.items * 2
    arrange, kernel = _place_batch_functions(
        plan, layout, scales.dtype, x.dtype, card(x.device.index)
    )
    work = place_batch_work(plan, layout)
    sums, flags = place_batch_sums(plan, work)
    size = places_bytes(layout, plan.tokens)
    arranged = torch.empty(size, dtype=torch.uint8, device=x.device)
    factors = torch.empty(plan.tokens + flags, dtype=torch.float32, device=x.device)
    partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    blocks, threads, cluster = places_grid(layout, plan.tokens)
    arrange(
        _PrefillArrangeArguments(
            x.data_ptr(), arranged.data_ptr(), factors.data_ptr(), x.stride(0), tokens,
            layout.inputs, slices, flags,
        ),
        (blocks, 1, 1), threads, cluster,
    )
    arguments = _PlaceBatchArguments(
        *_weight_boxes(plan.rows // 16, planes, scales, layout), arranged.data_ptr(),
        factors.data_ptr(),
        _Results(_pointer(bias), y.data_ptr(), y.stride(0), layout.rows, tokens),
        layout.tiles, layout.items, layout.groups, layout.items_per_group,
        _Shares(
            work.share, work.extra, partial.data_ptr(), factors.data_ptr() + 4 * plan.tokens
        ),
    )
    kernel(arguments, (work.blocks, 1, 1), (plan.groups + 1) * 128)


class _StepsArguments(ctypes.Structure):
    _fields_ = [
        ("scales", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("groups_of_rows", ctypes.c_int),
    ]


def add_steps(scales: Tensor, layout: Layout, uniform: bool) -> Tensor:
    """Prepared scales followed by the integers of `steps.cu` (int16 as bits), where used."""
    device = card(scales.device.index)
    if not (has_steps(layout, uniform) and code_plans(layout, uniform, 2, 64, device)):
        return scales
    if scales.dtype != torch.float16:
        return scales
    count = layout.tiles * layout.groups * 16
    whole = torch.cat([scales, scales.new_empty(count)])
    kernel = function("steps", format_defines(layout, uniform, scales.dtype, scales.dtype), device)
    with torch.cuda.device(device.index):
        kernel(
            _StepsArguments(
                whole.data_ptr(), whole.data_ptr() + 2 * scales_size(layout), count
            ),
            (-(-count // 256), 1, 1),
            256,
        )
    return whole


@cache
def _dequantize_function(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, device: Card
) -> Function:
    return function("dequantize", format_defines(layout, uniform, scale, x), device)


_workspaces: dict[tuple[int, torch.dtype], Tensor] = {}


def dense_workspace(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Scratch memory for dense rows, one per device and dtype, made once and never freed."""
    assert device.index is not None
    key = (device.index, dtype)
    if key not in _workspaces:
        if torch.cuda.is_current_stream_capturing():
            raise KernelError(
                "the workspace for long inputs is not allocated yet and cannot be while a CUDA "
                "graph is captured; run the layer once before capturing"
            )
        size = DENSE_WORKSPACE_BYTES // dtype.itemsize
        try:
            _workspaces[key] = torch.empty(size, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{device} has no room for the {DENSE_WORKSPACE_BYTES >> 20} MiB in which long "
                f"inputs are multiplied ({str(error).splitlines()[0]}); use fewer bits, a shorter "
                "context, or free memory"
            ) from error
    return _workspaces[key]


def dense_linear(
    plan: DensePlan, x: Tensor, planes: Tensor, scales: Tensor, y: Tensor, layout: Layout,
    uniform: bool,
) -> None:
    """``y = x @ W.T`` by expanding ``plan.rows`` rows at a time into a reused tile."""
    device = card(x.device.index)
    kernel = _dequantize_function(layout, uniform, scales.dtype, x.dtype, device)
    workspace = dense_workspace(x.device, x.dtype)
    if workspace.numel() < plan.rows * layout.inputs:
        workspace = x.new_empty(plan.rows * layout.inputs)
    step = plan.rows // TILE_ROWS
    for begin in range(0, layout.tiles, step):
        end = min(begin + step, layout.tiles)
        arguments = _DequantizeArguments(
            planes.data_ptr(), scales.data_ptr(), workspace.data_ptr(), layout.inputs, begin, end,
            layout.items, layout.groups, layout.items_per_group,
        )
        warps = (end - begin) * layout.items * 2
        kernel(arguments, (-(-warps // 8), 1, 1), 256)
        first, last = begin * TILE_ROWS, min(end * TILE_ROWS, layout.rows)
        dense = workspace[: (last - first) * layout.inputs].view(last - first, layout.inputs)
        torch.mm(x, dense.T, out=y[:, first:last])


def run(
    plan: Plan, x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor,
    layout: Layout, uniform: bool,
) -> bool:
    """One product by ``plan``; whether the bias was added.

    A plan for few tokens takes more of them in several launches.
    """
    if isinstance(plan, FewPlan | StreamPlan | SparsePlan | PlaceBatchPlan | CodeBatchPlan):
        for i in range(0, x.shape[0], plan.tokens):
            part = slice(i, i + plan.tokens)
            if isinstance(plan, FewPlan):
                few_linear(plan, x[part], planes, scales, bias, y[part], layout, uniform)
            elif isinstance(plan, StreamPlan):
                stream_linear(plan, x[part], planes, scales, bias, y[part], layout, uniform)
            elif isinstance(plan, SparsePlan):
                sparse_linear(plan, x[part], planes, scales, bias, y[part], layout)
            elif isinstance(plan, PlaceBatchPlan):
                place_batch_linear(plan, x[part], planes, scales, bias, y[part], layout)
            else:
                code_batch_linear(plan, x[part], planes, scales, bias, y[part], layout, uniform)
        return True
    if isinstance(plan, FieldPlan):
        field_linear(plan, x, planes, scales, bias, y, layout, uniform)
        return True
    if isinstance(plan, CodePlan):
        code_linear(plan, x, planes, scales, bias, y, layout, uniform)
        return True
    if isinstance(plan, PrefillPlan):
        prefill_linear(plan, x, planes, scales, bias, y, layout, uniform)
        return True
    dense_linear(plan, x, planes, scales, y, layout, uniform)
    return False


def multiply(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, layout: Layout, uniform: bool
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``[tokens, inputs]``, by the plan for that many tokens."""
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    y = x.new_empty(x.shape[0], layout.rows)
    if y.numel() == 0:
        return y
    device = card(x.device.index)
    plan, _ = choose(layout, uniform, scales.dtype.itemsize, x.shape[0], device)
    fused = bias if bias is not None and bias.dtype == x.dtype else None
    with torch.cuda.device(x.device.index):
        added = run(plan, x, planes, scales, fused, y, layout, uniform)
    if bias is not None and not (added and fused is not None):
        y += bias
    return y


def plan_instances(
    plan: Plan, layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype
) -> list[tuple[str, dict[str, int]]]:
    """Kernel files that a plan launches, each with its compile-time parameters."""
    if isinstance(plan, FewPlan):
        return [(plan.kernel, few_defines(plan, layout, uniform, scale, x))]
    if isinstance(plan, StreamPlan):
        return [("stream_linear", stream_defines(plan, layout, uniform, scale, x))]
    if isinstance(plan, SparsePlan):
        return [("sparse_linear", sparse_defines(plan, layout, scale, x))]
    if isinstance(plan, FieldPlan):
        arrange, main = field_defines(plan, layout, uniform, scale, x)
        return [("arrange", arrange), ("field_linear", main)]
    if isinstance(plan, CodePlan):
        arrange, main = code_defines(plan, layout, uniform, scale, x)
        return [("arrange", arrange), ("code_linear", main)]
    if isinstance(plan, PlaceBatchPlan):
        arrange, main = place_batch_defines(plan, layout, scale, x)
        return [("place_arrange", arrange), ("place_batch", main)]
    if isinstance(plan, CodeBatchPlan):
        arrange, main = code_batch_defines(plan, layout, uniform, scale, x)
        return [("prefill_arrange", arrange), ("code_batch", main)]
    if isinstance(plan, PrefillPlan):
        arrange, main = prefill_defines(plan, layout, uniform, scale, x)
        return [("prefill_arrange", arrange), ("code_prefill", main)]
    return [("dequantize", format_defines(layout, uniform, scale, x))]


@cache
def may_be_dense(layout: Layout, uniform: bool, scale_bytes: int, device: Card) -> bool:
    """Whether products of some number of tokens expand the weight, which takes a workspace."""
    numbers = (1 << n for n in range(17))  # rules and tables do not change beyond
    return any(
        isinstance(choose(layout, uniform, scale_bytes, n, device)[0], DensePlan) for n in numbers
    )


def load(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, device: torch.device,
    tokens: tuple[int, ...] = (1,),
) -> None:
    """Compile and load the kernels for some numbers of tokens, and allocate what they work in.

    Where a larger number would be multiplied by the library, what that takes is made ready, too.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    if x not in (torch.float16, torch.bfloat16):
        raise KernelError(f"the CUDA kernels take float16 and bfloat16 activations, not {x}")
    gpu = card(index)
    for count in tokens:
        plan, _ = choose(layout, uniform, scale.itemsize, count, gpu)
        if isinstance(plan, FewPlan):
            _few_function(plan, layout, uniform, scale, x, gpu)
        elif isinstance(plan, StreamPlan):
            _stream_function(plan, layout, uniform, scale, x, gpu)
        elif isinstance(plan, SparsePlan):
            _sparse_function(plan, layout, scale, x, gpu)
        elif isinstance(plan, FieldPlan):
            _field_functions(plan, layout, uniform, scale, x, gpu)
        elif isinstance(plan, CodePlan):
            _code_functions(plan, layout, uniform, scale, x, gpu)
        elif isinstance(plan, PlaceBatchPlan):
            _place_batch_functions(plan, layout, scale, x, gpu)
        elif isinstance(plan, CodeBatchPlan):
            _code_batch_functions(plan, layout, uniform, scale, x, gpu)
        elif isinstance(plan, PrefillPlan):
            _prefill_functions(plan, layout, uniform, scale, x, gpu)
    if may_be_dense(layout, uniform, scale.itemsize, gpu):
        _dequantize_function(layout, uniform, scale, x, gpu)
        dense_workspace(torch.device("cuda", index), x)
