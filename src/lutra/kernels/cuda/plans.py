"""Plans: which kernel multiplies a number of tokens, and how its blocks share the work.

A plan is a frozen description of one product; a list of plans, best guess first, is a pure function
of the layout and the card. Which one is taken: `tuning.py`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.code_batch_plans import CodeBatchPlan
from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import ITEM_INPUTS, TILE_ROWS, Layout
from lutra.kernels.cuda.place_batch_plans import PlaceBatchPlan
from lutra.kernels.cuda.prefill_plans import STEP_GROUPS, PrefillPlan
from lutra.kernels.cuda.sparse_plans import SparsePlan
from lutra.kernels.cuda.stream_plans import StreamPlan

MAX_FEW_TOKENS = 16
RING_BYTES = 176 << 10  # of weights in flight per block
LEAST_RING_BYTES = 48 << 10  # still hides the latency
SMALL_WEIGHT = 64 << 20  # numbers
BINARY_TOKENS = 2  # most for `binary_linear`; more take `byte_linear`
LEAST_ROWS = 16  # of fewer, all outputs may cancel: then the rounding of x would show
DENSE_WORKSPACE_BYTES = 128 << 20
FIELD_WIDTHS = (8, 16, 32, 64)
# Registers of a thread of `code_linear.cu` by width, without and with cutting ahead.
CODE_REGISTERS = {8: (72, 104), 16: (72, 112), 32: (80, 112), 64: (104, 128), 128: (128, 168)}


@dataclass(frozen=True)
class FewPlan:
    """One launch of a kernel for few tokens (`few_tokens.cuh`, `exact_linear.cu`).

    Attributes:
        kernel: ``binary_linear``, ``byte_linear`` or, for very few rows, ``exact_linear``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        warps, stages: warps of a block, items in flight per warp.
        blocks: blocks that fit on a processor; 2 lets the next product start during this one.
        k_warps: warps that share one tile's inputs; the others take further tiles.
        panel_items: items of x that a block holds at a time.
        grid, shared_bytes: of the launch.
        early: items per warp that are fetched before the kernel ahead has finished.
        cut: inputs that a thread of ``binary_linear`` cuts at a time, 16 or 32.
    """

    kernel: str
    tokens: int
    warps: int
    stages: int
    blocks: int
    k_warps: int
    panel_items: int
    grid: int
    shared_bytes: int
    early: int = 1
    cut: int = 16


@dataclass(frozen=True)
class FieldPlan:
    """One launch of `field_linear.cu`.

    Attributes:
        kernel: ``field_linear``.
        tokens: tokens of one block, a width of the tensor-core product.
        warpgroups: each takes 64 rows.
        stages, ahead: slices of x in shared memory, slices of weights in registers.
        blocks: blocks that a processor holds at a time.
        cluster: blocks that share the inputs of a row.
        row_blocks, shared_bytes: of the launch.
    """

    kernel: str
    tokens: int
    warpgroups: int
    stages: int
    ahead: int
    blocks: int
    cluster: int
    row_blocks: int
    shared_bytes: int


@dataclass(frozen=True)
class CodePlan:
    """One launch of `code_linear.cu`.

    Attributes:
        kernel: ``code_linear``.
        tokens: tokens of one block, a width of the tensor-core product.
        warpgroups: each takes 64 rows; one more warp fetches.
        stages: slices in shared memory.
        ahead: 1 if a warpgroup cuts a slice while it multiplies with the one before.
        blocks: blocks that a processor holds at a time.
        cluster: blocks that split the inputs of a row.
        near_tiles: token tiles of the same rows that run side by side.
    """

    kernel: str
    tokens: int
    warpgroups: int
    stages: int
    ahead: int
    blocks: int
    cluster: int
    near_tiles: int


@dataclass(frozen=True)
class DensePlan:
    """Expand ``rows`` rows at a time and multiply them with the library.

    Attributes:
        kernel: ``dense``.
        rows: a multiple of 16.
    """

    kernel: str
    rows: int


Plan = (
    FewPlan | StreamPlan | SparsePlan | PlaceBatchPlan
    | CodeBatchPlan | FieldPlan | CodePlan | PrefillPlan | DensePlan
)


@cache
def few_plans(layout: Layout, scale_bytes: int, tokens: int, device: Card) -> tuple[FewPlan, ...]:
    """Plans for 1 to 16 tokens; none if the card has too little shared memory for so many."""
    if tokens > MAX_FEW_TOKENS:
        return ()
    if layout.rows < LEAST_ROWS:
        return (
            FewPlan(
                "exact_linear", MAX_FEW_TOKENS, 4, 1, 1, 1, layout.items, layout.rows, 0
            ),
        )
    one = _whole_plan(layout, scale_bytes, tokens, device)
    if one is None:
        one = _panel_plan(layout, scale_bytes, tokens, device)
    if one is None:
        return ()
    plans: list[FewPlan | None] = [one]
    if tokens <= 4 and layout.group >= 128 and device.capability == (9, 0):  # measured there
        shapes = [(16, stages, 1, 16) for stages in (2, 3, 4, 5, 6, 7)]
        shapes += [(16, stages, 3, 16) for stages in (4, 5, 6)]  # more weights before x
        if layout.rows * layout.inputs <= SMALL_WEIGHT:  # x is what a small product waits for
            shapes += [(16, stages, 0, 16) for stages in (2, 3, 4, 5)]
        turns = _ceil(layout.items * 16 * tokens, 512)  # in which 512 threads cut x, 16 inputs each
        if turns == 2 and tokens <= BINARY_TOKENS:  # the other kernel has too few registers then
            shapes += [(24, stages, early, 16) for stages in (3, 4, 5) for early in (1, 3)]
        if turns > 1 and tokens <= BINARY_TOKENS:
            shapes += [(16, stages, early, 32) for stages in (3, 4, 5) for early in (1, 2, 3)]
        for (warps, stages, early, cut), k_warps in itertools.product(shapes, (4, 8, 16, 24)):
            plans.append(
                _whole_plan(
                    layout, scale_bytes, tokens, device, warps, stages, k_warps=k_warps,
                    early=early, cut=cut,
                )
            )
    elif one.panel_items == layout.items and one.k_warps < one.warps:
        plans.append(_whole_plan(layout, scale_bytes, tokens, device, k_warps=one.warps))
    return tuple(dict.fromkeys(plan for plan in plans if plan is not None))


@dataclass(frozen=True)
class _FewSizes:
    """Bytes of shared memory that a block for few tokens takes."""

    kernel: str
    compiled: int  # tokens
    item: int  # of x
    stage: int  # of weights
    tile: int  # of sums

    @classmethod
    def of(cls, layout: Layout, scale_bytes: int, tokens: int) -> _FewSizes:
        records = 2 * max(1, 128 // layout.group) * 96
        # A token costs the binary kernel 12 instructions a plane, the other one 2.5, and 25 once.
        if tokens <= BINARY_TOKENS:
            kernel, compiled, item = "binary_linear", tokens, tokens * (576 + records)
        else:
            kernel, compiled = "byte_linear", next(n for n in (4, 8, 16) if n >= tokens)
            item = compiled // 4 * (2048 + records)
        scales = (256 // layout.group) * 8 * layout.slots * 2 * scale_bytes
        return cls(kernel, compiled, item, layout.bits * 512 + scales, compiled * TILE_ROWS * 4)

    def fixed(self, warps: int, stages: int) -> int:
        rounds = 2 if self.compiled > 4 else 4  # tiles between two meetings of the warps
        return warps * (stages * self.stage + rounds * self.tile)


def _whole_plan(
    layout: Layout, scale_bytes: int, tokens: int, device: Card, warps: int = 0, stages: int = 0,
    k_warps: int = 0, early: int = 1, cut: int = 16,
) -> FewPlan | None:
    """A plan that holds all of x, if that fits; zeros: by rule."""
    sizes = _FewSizes.of(layout, scale_bytes, tokens)
    room = device.shared_bytes - layout.items * sizes.item
    warps = warps or _warps(device)
    if not stages:
        most = max(2, min(6, RING_BYTES // (warps * sizes.stage)))
        least = max(2, min(most, _ceil(LEAST_RING_BYTES, warps * sizes.stage)))
        fitting = (s for s in range(most, least - 1, -1) if sizes.fixed(warps, s) <= room)
        stages = next(fitting, 0)
    if not stages or warps % max(k_warps, 1) or sizes.fixed(warps, stages) > room:
        return None
    k_warps = k_warps or _k_warps(layout, warps, device.processors)
    grid = min(device.processors, _ceil(layout.tiles, warps // k_warps))
    shared = sizes.fixed(warps, stages) + layout.items * sizes.item
    return FewPlan(
        sizes.kernel, sizes.compiled, warps, stages, 1, k_warps, layout.items, grid, shared,
        min(early, stages), cut,
    )


def _panel_plan(
    layout: Layout, scale_bytes: int, tokens: int, device: Card
) -> FewPlan | None:
    """A plan that holds a part of x at a time: as many warps as possible, then as few parts."""
    sizes = _FewSizes.of(layout, scale_bytes, tokens)

    def kept(row_parts: int) -> int:
        """Bytes of sums between the parts."""
        return _ceil(layout.tiles, device.processors * row_parts) * row_parts * sizes.tile

    def room(warps: int, stages: int, row_parts: int) -> int:
        """Items of x that fit."""
        left = device.shared_bytes - sizes.fixed(warps, stages) - kept(row_parts)
        return max(left, 0) // sizes.item

    least = max(2, _ceil(LEAST_RING_BYTES, 16 * sizes.stage))
    options = [
        (w, s, k)
        for w in (16, 8, 4) if w <= _warps(device)
        for s in (least, 2)
        for k in (16, 8, 4) if k <= w and room(w, s, w // k) >= k
    ]
    if not options:
        return None
    warps, stages, k_warps = options[0]
    parts = warps // k_warps
    panels = _ceil(layout.items, room(warps, stages, parts) // k_warps * k_warps)
    panel = min(_ceil(_ceil(layout.items, panels), k_warps) * k_warps, layout.items)
    shared = sizes.fixed(warps, stages) + panel * sizes.item + kept(parts)
    grid = min(device.processors, _ceil(layout.tiles, parts))
    return FewPlan(
        sizes.kernel, sizes.compiled, warps, stages, 1, k_warps, panel, grid, shared
    )


def _warps(device: Card) -> int:
    return 16 if device.shared_bytes >= 160 << 10 else 8


def _k_warps(layout: Layout, warps: int, processors: int) -> int:
    """Warps on one tile, so that the rounds of tiles and of items come out even."""

    def cost(k: int) -> float:
        rounds = _ceil(layout.tiles, processors * (warps // k))
        return rounds * (_ceil(layout.items, k) + 0.3)  # 0.3 items: the sums of a tile meet

    return min((k for k in (16, 8, 4) if k <= warps), key=cost)  # fewer: measured to be slower


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@cache
def few_tokens_limit(layout: Layout, scale_bytes: int, device: Card) -> int:
    """How many tokens one launch of the kernels for few tokens can take; 0 if none."""
    fitting = (n for n in (16, 8, 4, 2, 1) if few_plans(layout, scale_bytes, n, device))
    return next(fitting, 0)


@cache
def field_plans(
    layout: Layout, uniform: bool, tokens: int, device: Card
) -> tuple[FieldPlan, ...]:
    """Plans on Hopper for groups of 128 and more, best guess first."""
    if device.capability != (9, 0) or layout.group < 128:
        return ()
    if inputs_bytes(layout) + 1024 > device.shared_bytes:
        return ()
    codes = uniform and layout.bits <= 4
    slices = layout.items * 2
    width = next((n for n in FIELD_WIDTHS if n >= tokens), FIELD_WIDTHS[-1])
    token_tiles = _ceil(tokens, width)
    scored = []
    full = width == 64 and layout.bits >= 4  # of registers; others do not fit or spill
    for warpgroups in (2, 3) if full or (width == 64 and not codes) else (2, 3, 4):
        most = 1 if warpgroups > 2 or full else (3 if width <= 16 else 2)
        row_blocks = _ceil(layout.rows, 64 * warpgroups)
        for cluster in (1, 2, 4, 8):
            if cluster > 1 and cluster * 2 > slices:
                continue
            grid = row_blocks * cluster * token_tiles
            resident = min(most, _ceil(grid, device.processors))
            waves = _ceil(grid, device.processors * resident)
            # Cycles of a slice of 64 rows: alone, and of a processor that is full of them.
            busy = max(700, (250 + 3.75 * width) * warpgroups * resident)
            score = waves * (_ceil(slices, cluster) + 6) * busy
            ahead = max(1, min(3 if width <= 16 and resident < 3 else 2, 9 // layout.bits))
            stages = 8 if resident == 1 or (width < 64 and resident == 2) else 4
            shared = field_shared_bytes(width, warpgroups, stages)
            # The blocks of a grid are packed, not spread: leave no room for more than should share.
            shared = max(shared, device.processor_shared_bytes // (resident + 1) - 1023)
            plan = FieldPlan(
                "field_linear", width, warpgroups, stages, ahead, resident, cluster, row_blocks,
                min(shared, device.shared_bytes),
            )
            scored.append((score, plan))
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)


def field_shared_bytes(width: int, warpgroups: int, stages: int) -> int:
    """Shared memory of `field_linear.cu`: the ring of x, then the block's sums in its place."""
    return max(stages * width * 260, width * (warpgroups * 64 + 4) * 4)


@cache
def code_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[CodePlan, ...]:
    """Plans on Hopper for up to 4 bits in groups of 128 and more, best first."""
    fits = layout.bits <= 4 and scale_bytes == 2 and layout.group >= 128
    if has_steps(layout, uniform) and layout.bits == 4:  # steps are good on average: see steps.cu
        fits = fits and layout.rows * layout.groups >= STEP_GROUPS
    fits = fits and inputs_bytes(layout) + 1024 <= device.shared_bytes
    if device.capability != (9, 0) or not fits:
        return ()
    slices = layout.items * 2
    width = next((n for n in CODE_REGISTERS if n >= tokens), max(CODE_REGISTERS))
    token_tiles = _ceil(tokens, width)
    # Cycles of a slice of 64 rows: the tensor core, cutting codes, memory.
    cutting = (0, 180, 180, 280, 360)[layout.bits] if has_steps(layout, uniform) else 180
    slice_cycles = max(4.2 * width, cutting, 62 * layout.bits)
    scored = []
    for warpgroups, blocks, cluster, ahead in itertools.product(
        (2, 3, 4), (1, 2, 3), (1, 2, 4, 8), (0, 1)
    ):
        warps = _ceil((warpgroups * 4 + 1) * blocks, 4)  # of one of a processor's four parts
        room = min(device.shared_bytes, device.processor_shared_bytes // blocks - 1024) - 512
        stages = min(12, room // code_stage_bytes(layout, uniform, width, warpgroups))
        if (1 << 14) // (warps * 32) // 8 * 8 < CODE_REGISTERS[width][ahead] or stages < 4:
            continue
        if code_shared_bytes(layout, uniform, width, warpgroups, stages) > room:
            continue
        if 1 < cluster > slices // 4 or (ahead and width < 128):  # pays only there
            continue
        grid = _ceil(layout.rows, 64 * warpgroups) * token_tiles * cluster
        usable = device.processors * 9 // 10 if cluster > 2 else device.processors
        each = _ceil(grid, usable)  # blocks of the processor that has most
        alone = 600 / (warpgroups * min(blocks, each))  # latency that too few warps leave bare
        work = each * warpgroups * (_ceil(slices, cluster) + 3) * max(slice_cycles, alone)
        score = work + _ceil(each, blocks) * (2000 + 25 * width) + 300 * cluster + ahead
        plan = CodePlan(
            "code_linear", width, warpgroups, stages, ahead, blocks, cluster, min(4, token_tiles)
        )
        scored.append((score, plan))
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)


def has_steps(layout: Layout, uniform: bool) -> bool:
    """Whether `code_linear.cu` needs the integers of `steps.cu` for a format."""
    return not uniform and 2 <= layout.bits <= 4 and layout.group >= 128


def code_stage_bytes(layout: Layout, uniform: bool, width: int, warpgroups: int) -> int:
    """Shared memory of one slice of `code_linear.cu`: x, planes, scales, integers of steps."""
    tile = layout.bits * 256 + layout.slots * 32 + (32 if has_steps(layout, uniform) else 0)
    return width * 256 + warpgroups * 4 * tile


def code_shared_bytes(
    layout: Layout, uniform: bool, width: int, warpgroups: int, stages: int
) -> int:
    """Shared memory of `code_linear.cu`: its ring, then the block's sums in its place."""
    return max(
        stages * code_stage_bytes(layout, uniform, width, warpgroups),
        width * (warpgroups * 64 + 4) * 4,
    )


def dense_plans(layout: Layout, element_bytes: int = 2) -> tuple[DensePlan, ...]:
    """Plans for any number of tokens: smaller tiles stay in L2, larger ones fill the card."""
    plans = []
    for size in (DENSE_WORKSPACE_BYTES // 2, DENSE_WORKSPACE_BYTES, DENSE_WORKSPACE_BYTES // 4):
        tiles = max(1, min(layout.tiles, size // (TILE_ROWS * layout.inputs * element_bytes)))
        parts = _ceil(layout.tiles, tiles)
        plans.append(DensePlan("dense", _ceil(layout.tiles, parts) * TILE_ROWS))
    return tuple(dict.fromkeys(plans))


def inputs_bytes(layout: Layout) -> int:
    """Shared memory of `arrange.cu`: one row of x."""
    return layout.items * ITEM_INPUTS * 2
