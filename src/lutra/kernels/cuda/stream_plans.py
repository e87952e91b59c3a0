"""Plans of `stream_linear.cu`: how warps, blocks and clusters share a product of 5 to 16 tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import TILE_ROWS, Layout, is_short

STREAM_TOKENS = (8, 16)  # widths that are compiled
ARRANGERS = 4  # warps of a block that put x in order, each a slice of a chunk
MOST_WARPS = {1: 14, 2: 16, 4: 12}  # that multiply and whose registers suffice, by tiles
MOST_STAGES = 8
# Share of the processors that clusters of a size fill on an H200, whose parts differ in size.
CLUSTERS = {1: 1.0, 2: 1.0, 3: 0.89, 4: 0.91, 8: 0.91}
MOST_CHUNKS = 12
RESERVED_BYTES = 3072  # what the kernel declares itself, at most


@dataclass(frozen=True)
class StreamPlan:
    """One launch of `stream_linear.cu`.

    Attributes:
        kernel: ``stream_linear``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        tiles: tiles of 16 rows that a warp multiplies with the same x.
        warps, k_warps: warps of a block that multiply; those of them that take the inputs of the
            same rows in turn.
        stages, early: slices in a warp's ring of weights; those of them that are fetched at once,
            so that x does not wait behind the rest.
        chunks: of four slices, in a block's ring of x.
        cluster: blocks that split the inputs.
        clusters: of the launch, each with rows of its own.
    """

    kernel: str
    tokens: int
    tiles: int
    warps: int
    k_warps: int
    stages: int
    early: int
    chunks: int
    cluster: int
    clusters: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return (self.warps + ARRANGERS) * 32


@dataclass(frozen=True)
class StreamSizes:
    """What a plan takes.

    Attributes:
        passes: times that a block goes over its part of x, with other rows each time.
        sums_offset: of the sums in shared memory, in bytes.
        shared_bytes: dynamic shared memory of a block.
    """

    passes: int
    sums_offset: int
    shared_bytes: int


def stream_sizes(plan: StreamPlan, layout: Layout) -> StreamSizes:
    """Shared memory of a plan: the warps' rings, the ring of x, the sums of rows.

    The sums take the place of x if no further pass needs it.
    """
    stage = _ceil(plan.tiles * (layout.bits * 256 + 64), 128) * 128
    rings = plan.warps * plan.stages * stage
    x = plan.chunks * plan.tokens * (ARRANGERS * (256 + 8) + 4)
    rows = plan.warps // plan.k_warps * plan.tiles * TILE_ROWS  # of a block at a time
    passes = _ceil(layout.rows, rows * plan.clusters)
    sums = plan.k_warps * plan.tokens * (rows + 4) * 4
    if passes == 1:
        return StreamSizes(passes, rings, rings + max(x, sums))
    return StreamSizes(passes, rings + x, rings + x + sums)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def stream_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[StreamPlan, ...]:
    """Plans on Hopper, best guess first; none for other formats, cards and numbers of tokens."""
    width = next((n for n in STREAM_TOKENS if n >= tokens), 0)
    if not width or device.capability != (9, 0) or layout.bits > 4 or layout.group < 128:
        return ()
    return _plans(layout, uniform, scale_bytes, width, device)


@cache
def _plans(
    layout: Layout, uniform: bool, scale_bytes: int, width: int, device: Card
) -> tuple[StreamPlan, ...]:
    slices = layout.items * 2
    # Clocks: of a tile's slice, of one of a warp that is alone, of putting one in order.
    work, alone, arranging = {8: (42, 350, 350), 16: (50, 450, 700)}[width]
    scored: list[tuple[float, StreamPlan]] = []
    for tiles, warps, k_warps, cluster, (most_stages, early) in itertools.product(
        MOST_WARPS, (8, 9, 12, 14, 16), (1, 2, 3, 4, 6), CLUSTERS, ((3, 3), (6, 2))
    ):
        if warps % k_warps or warps > MOST_WARPS[tiles]:
            continue
        units = _ceil(layout.tiles, tiles)
        held = max(1, int(device.processors * CLUSTERS[cluster]) // cluster)
        passes = _ceil(units, warps // k_warps * held)
        clusters = _ceil(units, warps // k_warps * passes)
        of_block = _ceil(slices, cluster)
        busy = warps * tiles * work * (1.2 if tiles == 1 else 1.0)  # x is read for every tile
        each = max(_ceil(of_block, k_warps) * max(busy, alone * tiles), of_block * arranging)
        score = passes * (each + of_block * width * 8 + 3000 + 700 * cluster)
        for stages in range(most_stages, 1, -1):
            plan = StreamPlan(
                "stream_linear", width, tiles, warps, k_warps, stages, min(early, stages),
                min(4, _ceil(of_block, ARRANGERS)), cluster, clusters,
            )
            if stream_fits(plan, layout, uniform, scale_bytes, width, device):
                scored.append((score, plan))
                break
    scored.sort(key=lambda pair: pair[0])
    return tuple(dict.fromkeys(plan for _, plan in scored))


def stream_fits(
    plan: StreamPlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan can run, whoever made it."""
    return (
        device.capability == (9, 0)
        and (uniform or layout.bits == 1)
        and is_short(layout, scale_bytes)
        and tokens <= plan.tokens in STREAM_TOKENS
        and plan.tiles in MOST_WARPS
        and 8 <= plan.warps <= MOST_WARPS[plan.tiles]
        and plan.k_warps > 0 == plan.warps % plan.k_warps
        and 1 <= plan.early <= plan.stages
        and 2 <= plan.stages <= MOST_STAGES
        and 1 <= plan.chunks <= MOST_CHUNKS
        and plan.cluster in CLUSTERS
        and plan.cluster <= layout.items * 2
        and plan.clusters > 0
        and stream_sizes(plan, layout).shared_bytes <= device.shared_bytes - RESERVED_BYTES
    )
