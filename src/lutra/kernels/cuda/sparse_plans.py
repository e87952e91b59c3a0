"""Plans of `sparse_linear.cu`: how warps, blocks and clusters share products of up to 8 tokens."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import TILE_ROWS, Layout, is_short

SPARSE_TOKENS = (8,)  # widths that are compiled
SPARSE_BITS = (2, 3, 4)
X_BYTES = 8 * 512 + 8 * 16 + 32  # of a slice: operands, sums, a shift of banks
ALPHA_BYTES = 4 * 8 * 16  # of two planes of a tile, four slices
# Share of the processors that clusters of a size fill on an H200, whose parts differ in size.
CLUSTERS = {1: 1.0, 2: 1.0, 3: 0.89, 4: 0.91, 8: 0.91}
RESERVED_BYTES = 1024  # what the kernel declares itself
MOST_PLANS = 16


@dataclass(frozen=True)
class SparsePlan:
    """One launch of `sparse_linear.cu`.

    Attributes:
        kernel: ``sparse_linear``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        tiles: tiles of 16 rows that a warp multiplies with one reading of x.
        warps, k_warps: warps of a block; those of them that split the inputs of the same rows.
        stages: slices in a warp's ring.
        cluster: blocks that split the inputs.
        clusters: of the launch, each with rows of its own.
        panels: parts of a block's inputs; of more than one, two at a time are in shared memory.
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


@dataclass(frozen=True)
class SparseSizes:
    """What a plan takes.

    Attributes:
        passes: times that a block goes over its part of x, with other rows each time.
        x_bytes: of a panel, in shared memory.
        sums_offset: of the sums in shared memory, in bytes.
        shared_bytes: dynamic shared memory of a block.
    """

    passes: int
    x_bytes: int
    sums_offset: int
    shared_bytes: int


def sparse_sizes(plan: SparsePlan, layout: Layout) -> SparseSizes:
    """Shared memory of a plan: the warps' rings and alphas, x with its sums, the sums of rows.

    The sums of rows take the place of x if no further pass needs it.
    """
    alphas = (layout.bits + 1) // 2 * ALPHA_BYTES
    ring = plan.warps * plan.tiles * (plan.stages * layout.bits * 256 + alphas)
    slices = _ceil(_ceil(layout.items * 2, plan.cluster), plan.panels)
    panel = slices * X_BYTES
    x = panel * min(plan.panels, 2)
    rows = plan.warps // plan.k_warps * plan.tiles * TILE_ROWS  # of a block at a time
    passes = _ceil(layout.rows, rows * plan.clusters)
    sums = plan.k_warps * plan.tokens * (rows + 4) * 4
    if passes == 1:
        return SparseSizes(passes, panel, ring, ring + max(x, sums))
    return SparseSizes(passes, panel, ring + x, ring + x + sums)


def _tile_bytes(layout: Layout) -> int:
    """Planes and scales of a slice of a tile."""
    return layout.bits * 256 + layout.slots * 32


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _spills(tiles: int, warps: int, bits: int, panels: int) -> bool:
    """Whether so many warps leave a warp too few registers."""
    if tiles < 4:
        return warps > (20 if tiles == 2 else 18)
    if bits == 4 and panels == 1 and 8 < warps < 13:
        return True
    return warps > (16 if bits == 2 or panels == 1 else 12)


def sparse_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[SparsePlan, ...]:
    """Plans on Hopper, best guess first; none for other formats, cards and numbers of tokens."""
    width = next((n for n in SPARSE_TOKENS if n >= tokens), 0)
    if not width or uniform or layout.bits not in SPARSE_BITS or layout.group < 128:
        return ()
    return _plans(layout, scale_bytes, width, device) if device.capability == (9, 0) else ()


@cache
def _plans(
    layout: Layout, scale_bytes: int, width: int, device: Card
) -> tuple[SparsePlan, ...]:
    slices, scored = layout.items * 2, []
    for tiles, warps, k_warps, cluster, panels in itertools.product(
        (1, 2, 4), range(4, 21), (1, 2, 3, 4, 5, 6, 7, 8, 12), CLUSTERS, (1, 2, 3, 4, 6, 8, 12)
    ):
        if warps % k_warps or _spills(tiles, warps, layout.bits, panels):
            continue
        of_block = _ceil(slices, cluster)
        if panels > 1 and of_block < 2 * panels:
            continue
        units = _ceil(layout.tiles, tiles)
        most = max(1, int(device.processors * CLUSTERS[cluster]) // cluster)
        passes = _ceil(units, warps // k_warps * most)
        clusters = _ceil(units, warps // k_warps * passes)
        for stages in (8, 6, 5, 4, 3, 2):
            plan = SparsePlan(
                "sparse_linear", width, tiles, warps, k_warps, stages, cluster, clusters, panels
            )
            if sparse_fits(plan, layout, False, scale_bytes, width, device):
                scored.append((_clocks(plan, layout, passes), plan))
                break
    scored.sort(key=lambda pair: pair[0])
    alike: Counter[tuple[int, int, int]] = Counter()
    best = []
    for _, plan in scored:
        kind = (plan.tiles, plan.warps, plan.cluster)
        alike[kind] += 1
        if alike[kind] <= 2:
            best.append(plan)
    return tuple(best[:MOST_PLANS])


def _clocks(plan: SparsePlan, layout: Layout, passes: int) -> float:
    """Clocks of a product on an H200, fitted to 248 measured ones (to 8 % in the mean)."""
    of_block = _ceil(layout.items * 2, plan.cluster)
    memory = _tile_bytes(layout) / 3.9  # of a quarter of a processor, a slice of a tile
    products = 30 + 78 * ((layout.bits + 1) // 2)
    alone = 150 + 2.4 * products * plan.tiles  # a slice of a warp that is alone
    each = max(plan.warps / 4 * plan.tiles * max(memory, products), alone)
    score = 5400 + 200 * plan.cluster + passes * (_ceil(of_block, plan.k_warps) * each + 4500)
    first = 125 * of_block / plan.panels  # to prepare x
    if plan.panels == 1:
        return score + first
    return score + first + passes * (1.6 * first * (plan.panels - 1) + 1650 * plan.panels)


def sparse_fits(
    plan: SparsePlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan can run, whoever made it."""
    return (
        device.capability == (9, 0)
        and not uniform
        and layout.bits in SPARSE_BITS
        and is_short(layout, scale_bytes)
        and tokens <= plan.tokens in SPARSE_TOKENS
        and plan.tiles in (1, 2, 4)
        and 1 <= plan.warps <= 24
        and plan.k_warps > 0 == plan.warps % plan.k_warps
        and plan.stages >= 2
        and plan.cluster in CLUSTERS
        and plan.cluster * plan.panels <= layout.items * 2
        and plan.panels > 0
        and plan.clusters > 0
        and sparse_sizes(plan, layout).shared_bytes <= device.shared_bytes - RESERVED_BYTES
    )
