"""Plans of `batch_linear.cu`: how warps, blocks and clusters share a product of 5 to 64 tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import TILE_ROWS, Layout
from lutra.kernels.cuda.prefill_plans import STEP_GROUPS

BATCH_TOKENS = (8, 16, 32, 64)  # widths that are compiled
SUM_TOKENS = 16  # tokens whose sums meet in shared memory at a time
SLICE_CLOCKS = {8: 50, 16: 70, 32: 115, 64: 190}  # of codes: a processor, a tile of one slice
# Share of the processors that clusters of a size fill on an H200, whose parts differ in size.
CLUSTERS = {1: 1.0, 2: 1.0, 3: 0.89, 4: 0.91, 8: 0.91}
RESERVED_BYTES = 1024  # what the kernel declares itself


@dataclass(frozen=True)
class BatchPlan:
    """One launch of `batch_linear.cu`.

    Attributes:
        kernel: ``batch_linear``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        tiles: tiles of 16 rows that a warp multiplies with one reading of x.
        warps, k_warps: warps of a block; those of them that split the inputs of the same rows.
        stages: slices in a warp's ring.
        cluster: blocks that split the inputs.
        clusters: of the launch, each with rows of its own.
        panels: parts of a block's inputs, of which one at a time is in shared memory.
        signs: 0 if the planes of free levels meet in one product; else each has a sparse one, with
            accumulators of tiles (1) or of planes (2).
    """

    kernel: str
    tokens: int
    tiles: int
    warps: int
    k_warps: int
    stages: int
    cluster: int
    clusters: int
    panels: int = 1
    signs: int = 0


@dataclass(frozen=True)
class BatchSizes:
    """What a plan takes.

    Attributes:
        x_slices: most slices of x in a block at a time.
        passes: times that a block goes over its part of x, with other rows each time.
        sums_offset: of the sums in shared memory, in bytes.
        shared_bytes: dynamic shared memory of a block.
    """

    x_slices: int
    passes: int
    sums_offset: int
    shared_bytes: int


def batch_sizes(plan: BatchPlan, layout: Layout, uniform: bool) -> BatchSizes:
    """Shared memory of a plan: the warps' rings, x and its sums over slices, the sums of rows.

    The sums take the place of x if no further pass needs it.
    """
    slices = layout.items * 2
    if uniform or plan.signs or layout.bits == 1:
        stage, records = layout.bits * 256 + layout.slots * 32, 0
    else:
        stage, records = layout.bits * 256, record_bytes(layout)
    ring = plan.warps * plan.tiles * (plan.stages * stage + records)
    x_slices = max(
        slices * (r + 1) // plan.cluster - slices * r // plan.cluster for r in range(plan.cluster)
    )
    x_slices = _ceil(x_slices, plan.panels)
    x = x_slices * plan.tokens * (256 + 4)
    rows = plan.warps // plan.k_warps * plan.tiles * TILE_ROWS  # of a block at a time
    passes = _ceil(layout.rows, rows * plan.clusters)
    sums = plan.k_warps * min(plan.tokens, SUM_TOKENS) * (rows + 4) * 4
    if passes == 1:
        return BatchSizes(x_slices, passes, ring, ring + max(x, sums))
    return BatchSizes(x_slices, passes, ring + x, ring + x + sums)


def record_bytes(layout: Layout) -> int:
    """Shared memory of a tile's records of levels, four slices (`records.cuh`)."""
    return 32 * (32 if layout.bits == 2 else 48)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _clusters(cluster: int, device: Card) -> int:
    """Clusters that a card holds at a time."""
    return max(1, int(device.processors * CLUSTERS[cluster]) // cluster)


def _most_warps(kind: str, width: int, tiles: int, bits: int, panels: int, signs: int) -> int:
    """Warps of a block whose registers suffice."""
    sums = width * tiles  # of a warp
    if kind == "signs":
        one = panels == 1
        if sums > 32 or (tiles == 4 and bits == 4 and signs == 2 and not one):
            return 0
        if tiles == 4:
            return 12 if signs == 1 and (bits == 2 or (bits == 3 and one)) else 8
        if sums == 32:
            return 12 if bits == 2 or (one and (bits == 3 or signs == 1)) else 8
        if tiles == 2 and bits == 4:
            return 12 if one or signs == 1 else 8
        if tiles == 2 and bits == 3 and signs == 1:
            return 12
        return 16 if one and (bits < 4 or sums == 8) else 12
    if kind == "levels":
        return 16 if sums <= 16 else 0 if sums > 64 else 8 if sums == 64 and tiles > 1 else 12
    most = 16 if sums <= 32 else 14 if sums <= 64 else 8
    return 0 if sums > 128 else min(most, 12) if tiles == 4 or panels > 1 else most


def batch_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[BatchPlan, ...]:
    """Plans on Hopper, best guess first; none for other formats, cards and numbers of tokens."""
    width = next((n for n in BATCH_TOKENS if n >= tokens), 0)
    if not width or device.capability != (9, 0) or layout.bits > 4 or layout.group < 128:
        return ()
    return _plans(layout, uniform, scale_bytes, width, device)


@cache
def _plans(
    layout: Layout, uniform: bool, scale_bytes: int, width: int, device: Card
) -> tuple[BatchPlan, ...]:
    slices = layout.items * 2
    scored: list[tuple[float, BatchPlan]] = []
    kinds = (("codes", 0),) if uniform or layout.bits == 1 else (
        ("levels", 0), ("signs", 1), ("signs", 2)
    )
    for (kind, signs), tiles, warps, k_warps, cluster, panels in itertools.product(
        kinds, (1, 2, 4), (4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), (1, 2, 3, 4, 5, 8, 12),
        CLUSTERS, (1, 2, 4),
    ):
        if kind == "signs" and width > 16:  # too many products
            continue
        if warps % k_warps or warps > _most_warps(
            kind, width, tiles, layout.bits, panels, signs
        ):
            continue
        units = _ceil(layout.tiles, tiles)
        passes = _ceil(units, warps // k_warps * _clusters(cluster, device))
        clusters = _ceil(units, warps // k_warps * passes)
        # Clocks of a processor: of a tile's slice, and of a slice of a warp that is alone.
        work = {
            "codes": SLICE_CLOCKS[width],
            "signs": 8 + 2.2 * layout.bits * width,
            "levels": 30 + 13 * layout.bits + 1.6 * width,
        }[kind]
        alone = (450 + 10 * width) * tiles
        of_block = _ceil(slices, cluster)
        each = _ceil(of_block, k_warps) * max(warps * tiles * work, alone)
        score = passes * (each + 1500 * max(1, width // 16))
        score += 1500 * (1 if panels == 1 else panels * passes) + of_block * width * 32 / warps
        for stages in range(6, 2, -1):
            plan = BatchPlan(
                "batch_linear", width, tiles, warps, k_warps, stages, cluster, clusters, panels,
                signs,
            )
            if batch_fits(plan, layout, uniform, scale_bytes, width, device):
                scored.append((score * (1.0 if stages > 3 else 1.05), plan))
                break
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)


def batch_fits(
    plan: BatchPlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan can run, whoever made it."""
    return (
        device.capability == (9, 0)
        and layout.bits <= 4
        and layout.group >= 128
        and scale_bytes == 2
        and tokens <= plan.tokens in BATCH_TOKENS
        and plan.tiles in (1, 2, 4)
        and 1 <= plan.warps <= 16
        and plan.k_warps > 0 == plan.warps % plan.k_warps
        and plan.stages >= 2
        and plan.cluster in CLUSTERS
        and plan.cluster <= layout.items * 2
        and 1 <= plan.panels <= 8
        and plan.clusters > 0
        and plan.signs in (0, 1, 2)
        and not (plan.signs and uniform)
        and (
            plan.signs > 0 or uniform or layout.bits < 4
            or layout.rows * layout.groups >= STEP_GROUPS
        )
        and batch_sizes(plan, layout, uniform).shared_bytes
        <= device.shared_bytes - RESERVED_BYTES
    )
