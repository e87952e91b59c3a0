"""Plans and launches: which kernel multiplies how many tokens, with which parameters.

Every plan is a pure function of the layout and the card and is computed once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.kernels.cuda.launch import Card, Function, card, function
from lutra.kernels.cuda.layout import ITEM_INPUTS, TILE_ROWS, Layout

MAX_FEW_TOKENS = 16
# Most tokens for which a kernel is the fastest, by whether a weight is one code (True) or planes.
FEW_TOKENS = {True: 2, False: 4}
FIELD_TOKENS = {True: 192, False: 64}
DENSE_WORKSPACE_BYTES = 64 << 20
RING_BYTES = 96 << 10  # of weights in flight per processor; half of it still hides the latency


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


def format_defines(layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype) -> dict:
    """Compile-time parameters that every kernel takes."""
    return {
        "BITS": layout.bits,
        "GROUP": layout.group,
        "UNIFORM": int(uniform),
        "SCALE_FLOAT": int(scale == torch.float32),
        "X_BF16": int(x == torch.bfloat16),
    }


@dataclass(frozen=True)
class FewPlan:
    """Parameters of one launch of a kernel for few tokens (`few_tokens.cuh`).

    Attributes:
        kernel: ``binary_linear`` or ``byte_linear``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        warps, stages: warps of a block, items in flight per warp.
        k_warps: warps that share one tile's inputs; the others take further tiles.
        panel_items: items of x that a block holds at a time.
        grid, shared_bytes: of the launch.
    """

    kernel: str
    tokens: int
    warps: int
    stages: int
    k_warps: int
    panel_items: int
    grid: int
    shared_bytes: int


@lru_cache(maxsize=None)
def plan_few(layout: Layout, scale_bytes: int, tokens: int, device: Card) -> FewPlan | None:
    """Which kernel multiplies 1 to 16 tokens, and how its blocks share rows and inputs.

    None if the card has too little shared memory for so many tokens.
    """
    splits = max(1, 128 // layout.group)
    if tokens <= 2:  # a token costs the binary kernel 12 instructions a plane, the other 2.5 + 30 once
        kernel, compiled = "binary_linear", tokens
        per_item = tokens * (512 + 2 * splits * 64)
    else:
        kernel, compiled = "byte_linear", next(n for n in (4, 8, 16) if n >= tokens)
        per_item = compiled // 4 * (2048 + 2 * splits * 64)
    scales = (256 // layout.group) * 8 * layout.slots * 2 * scale_bytes
    stage = layout.bits * 512 + scales
    tile_bytes = compiled * TILE_ROWS * 4

    def fixed(warps: int, stages: int) -> int:
        return warps * stages * stage + 2 * warps * tile_bytes

    def room(warps: int, stages: int, row_parts: int) -> int:
        """Items of x that fit if rows are walked in panels."""
        steps = -(-layout.tiles // (device.processors * row_parts))
        left = device.shared_bytes - fixed(warps, stages) - steps * row_parts * tile_bytes
        return max(left, 0) // per_item

    warps = 16 if device.shared_bytes >= 160 << 10 else 8
    most = max(2, min(6, RING_BYTES // (16 * stage)))
    least = max(2, min(most, -(-RING_BYTES // 2 // (16 * stage))))
    for stages in range(most, least - 1, -1):
        shared = fixed(warps, stages) + layout.items * per_item
        if shared <= device.shared_bytes:

            def cost(k: int) -> float:
                blocks = device.processors * (warps // k)
                return -(-layout.tiles // blocks) * (-(-layout.items // k) + 0.3)

            k_warps = min((k for k in (16, 8, 4, 2, 1) if k <= warps), key=cost)
            panel = layout.items
            break
    else:
        # Panels: as many warps as possible, then as few panels.
        options = [
            (w, s, k)
            for w in (16, 8, 4) if w <= warps
            for s in (least, 2)
            for k in (16, 8, 4) if k <= w and room(w, s, w // k) >= k
        ]
        if not options:
            return None
        warps, stages, k_warps = options[0]
        panels = -(-layout.items // (room(warps, stages, warps // k_warps) // k_warps * k_warps))
        panel = min(-(-(-(-layout.items // panels)) // k_warps) * k_warps, layout.items)
        steps = -(-layout.tiles // (device.processors * (warps // k_warps)))
        shared = fixed(warps, stages) + panel * per_item + steps * (warps // k_warps) * tile_bytes
    grid = min(device.processors, -(-layout.tiles // (warps // k_warps)))
    return FewPlan(kernel, compiled, warps, stages, k_warps, panel, grid, shared)


@lru_cache(maxsize=None)
def few_tokens_limit(layout: Layout, scale_bytes: int, device: Card) -> int:
    """How many tokens one launch of the kernels for few tokens can take; 0 if none."""
    fitting = (n for n in (16, 8, 4, 2, 1) if plan_few(layout, scale_bytes, n, device))
    return next(fitting, 0)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=None)
def _few_function(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, tokens: int, device: Card
) -> tuple[FewPlan, Function]:
    plan = plan_few(layout, scale.itemsize, tokens, device)
    assert plan is not None, "the caller asks few_tokens_limit first"
    defines = format_defines(layout, uniform, scale, x)
    defines |= {"TOKENS": plan.tokens, "WARPS": plan.warps, "STAGES": plan.stages}
    return plan, function(plan.kernel, defines, device, plan.shared_bytes)


def few_linear(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, layout: Layout,
    uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for 1 to 16 rows of x; ``x`` and ``y`` have unit inner stride."""
    device = card(x.device.index)
    plan, kernel = _few_function(layout, uniform, scales.dtype, x.dtype, x.shape[0], device)
    arguments = _FewArguments(
        planes.data_ptr(), scales.data_ptr(), x.data_ptr(), _pointer(bias), y.data_ptr(),
        x.stride(0), y.stride(0), layout.rows, layout.inputs, x.shape[0], layout.tiles,
        layout.items, layout.groups, layout.items_per_group, plan.panel_items, plan.k_warps,
    )
    kernel(arguments, (plan.grid, 1, 1), plan.warps * 32)


@dataclass(frozen=True)
class FieldPlan:
    """Parameters of one launch of `field_linear.cu`.

    Attributes:
        tokens: tokens of one block, a width of the tensor-core product.
        token_tiles: blocks along the tokens.
        warpgroups: each takes 64 rows.
        stages, ahead: slices of x in shared memory, slices of weights in registers.
        blocks: blocks that a processor holds at a time.
        cluster: blocks that share the inputs of a row.
        row_blocks, shared_bytes: of the launch.
    """

    tokens: int
    token_tiles: int
    warpgroups: int
    stages: int
    ahead: int
    blocks: int
    cluster: int
    row_blocks: int
    shared_bytes: int


@lru_cache(maxsize=None)
def plan_field(layout: Layout, uniform: bool, tokens: int, device: Card) -> FieldPlan:
    """How blocks share rows, tokens and inputs."""
    width = next((n for n in (8, 16, 32) if n >= tokens), 64)
    tiles = -(-tokens // width)
    ahead = max(1, min(4 if width <= 16 else 2, 9 // layout.bits))
    slices = layout.items * 2
    most = 3 if width == 64 and not (uniform and layout.bits <= 4) else 4

    def cost(option: tuple[int, int]) -> float:
        warpgroups, cluster = option
        blocks = -(-layout.rows // (64 * warpgroups)) * cluster * tiles
        # Clusters of 4 and 8 leave the odd processors of a GPC idle.
        processors = device.processors if cluster <= 2 else device.processors // 8 * 8
        return -(-blocks // processors) * (-(-slices // cluster) + 4) * (warpgroups + 0.5)

    options = [(w, c) for w in range(most, 1, -1) for c in (1, 2, 4, 8) if c == 1 or c * 2 <= slices]
    warpgroups, cluster = min(options, key=cost)
    stages = 8
    shared = max(stages * width * 260, width * (warpgroups * 64 + 4) * 4)
    return FieldPlan(
        width, tiles, warpgroups, stages, ahead, 1, cluster, -(-layout.rows // (64 * warpgroups)),
        shared,
    )


@lru_cache(maxsize=None)
def _field_functions(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, tokens: int, device: Card
) -> tuple[FieldPlan, Function, Function]:
    plan = plan_field(layout, uniform, tokens, device)
    defines = format_defines(layout, uniform, scale, x) | {"TOKENS": plan.tokens}
    main = defines | {
        "WARPGROUPS": plan.warpgroups, "STAGES": plan.stages, "AHEAD": plan.ahead,
        "BLOCKS": plan.blocks,
    }
    return (
        plan,
        function("arrange", defines, device, layout.items * ITEM_INPUTS * 2),
        function("field_linear", main, device, plan.shared_bytes),
    )


def field_linear(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, y: Tensor, layout: Layout,
    uniform: bool,
) -> None:
    """``y = x @ W.T + bias`` for some tens of rows of x on Hopper; groups of 128 and more."""
    device = card(x.device.index)
    tokens = x.shape[0]
    plan, arrange, kernel = _field_functions(
        layout, uniform, scales.dtype, x.dtype, tokens, device
    )
    slices, padded = layout.items * 2, plan.tokens * plan.token_tiles
    arranged = torch.empty(slices * padded * 260, dtype=torch.uint8, device=x.device)
    factors = torch.empty(padded, dtype=torch.float32, device=x.device)
    arrange(
        _ArrangeArguments(
            x.data_ptr(), arranged.data_ptr(), factors.data_ptr(), x.stride(0), tokens,
            layout.inputs, slices,
        ),
        (padded, 1, 1),
        1024,
    )
    arguments = _FieldArguments(
        planes.data_ptr(), scales.data_ptr(), arranged.data_ptr(), factors.data_ptr(),
        _pointer(bias), y.data_ptr(), y.stride(0), layout.rows, tokens, layout.tiles,
        layout.items, layout.groups, layout.items_per_group,
    )
    grid = (plan.cluster, plan.row_blocks, plan.token_tiles)
    kernel(arguments, grid, plan.warpgroups * 128, plan.cluster)


@lru_cache(maxsize=None)
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
        _workspaces[key] = torch.empty(size, dtype=dtype, device=device)
    return _workspaces[key]


def dense_linear(
    x: Tensor, planes: Tensor, scales: Tensor, y: Tensor, layout: Layout, uniform: bool
) -> None:
    """``y = x @ W.T`` by expanding some rows at a time into a reused tile that stays in L2."""
    device = card(x.device.index)
    kernel = _dequantize_function(layout, uniform, scales.dtype, x.dtype, device)
    workspace = dense_workspace(x.device, x.dtype)
    tiles = workspace.numel() // (TILE_ROWS * layout.inputs)
    tiles = min(layout.tiles, tiles)
    if tiles == 0:
        workspace = x.new_empty(TILE_ROWS * layout.inputs)
        tiles = 1
    for begin in range(0, layout.tiles, tiles):
        end = min(begin + tiles, layout.tiles)
        arguments = _DequantizeArguments(
            planes.data_ptr(), scales.data_ptr(), workspace.data_ptr(), layout.inputs, begin, end,
            layout.items, layout.groups, layout.items_per_group,
        )
        warps = (end - begin) * layout.items * 2
        kernel(arguments, (-(-warps // 8), 1, 1), 256)
        first, last = begin * TILE_ROWS, min(end * TILE_ROWS, layout.rows)
        dense = workspace[: (last - first) * layout.inputs].view(last - first, layout.inputs)
        if first == 0 and last == layout.rows:
            torch.mm(x, dense.T, out=y)
        else:
            y[:, first:last] = x @ dense.T


@lru_cache(maxsize=None)
def choose(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[str, str]:
    """Kernel for a number of tokens, ``few``, ``field`` or ``dense``, and why.

    The limits are where the measured times cross on an H200 (docs/performance-gpu.md).
    """
    field = device.capability == (9, 0) and layout.group >= 128
    few = few_tokens_limit(layout, scale_bytes, device)
    codes = uniform and layout.bits <= 4
    if few and tokens <= (FEW_TOKENS[codes] if field else MAX_FEW_TOKENS):
        return "few", f"up to {FEW_TOKENS[codes] if field else MAX_FEW_TOKENS} tokens"
    if field and tokens <= FIELD_TOKENS[codes]:
        return "field", f"up to {FIELD_TOKENS[codes]} tokens on {device.arch}"
    return "dense", "more tokens than the fused kernels are faster for"


def multiply(
    x: Tensor, planes: Tensor, scales: Tensor, bias: Tensor | None, layout: Layout, uniform: bool
) -> Tensor:
    """``x @ W.T + bias`` for ``x`` ``[tokens, inputs]``, by the kernel for that many tokens."""
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    tokens = x.shape[0]
    y = x.new_empty(tokens, layout.rows)
    if tokens == 0 or layout.rows == 0:
        return y
    device = card(x.device.index)
    fused = bias if bias is None or bias.dtype == x.dtype else None
    kernel, _ = choose(layout, uniform, scales.dtype.itemsize, tokens, device)
    with torch.cuda.device(x.device.index):
        if kernel == "few":
            limit = few_tokens_limit(layout, scales.dtype.itemsize, device)
            for i in range(0, tokens, limit):
                part = slice(i, i + limit)
                few_linear(x[part], planes, scales, fused, y[part], layout, uniform)
        elif kernel == "field":
            field_linear(x, planes, scales, fused, y, layout, uniform)
        else:
            dense_linear(x, planes, scales, y, layout, uniform)
            fused = None
    if bias is not None and fused is None:
        y += bias
    return y


def load(
    layout: Layout, uniform: bool, scale: torch.dtype, x: torch.dtype, device: torch.device,
    tokens: tuple[int, ...] = (1,),
) -> None:
    """Compile and load the kernels for some numbers of tokens, and allocate their workspaces."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    if x not in (torch.float16, torch.bfloat16):
        raise KernelError(f"the CUDA kernels take float16 and bfloat16 activations, not {x}")
    limit = few_tokens_limit(layout, scale.itemsize, card(index))
    for count in tokens:
        if count <= limit:
            _few_function(layout, uniform, scale, x, count, card(index))
    _dequantize_function(layout, uniform, scale, x, card(index))
    dense_workspace(torch.device("cuda", index), x)
