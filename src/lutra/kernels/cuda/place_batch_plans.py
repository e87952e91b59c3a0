"""Plans of `place_batch.cu`: how blocks share a product of 5 to 64 tokens with free levels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import Layout, is_short

PLACE_BATCH_TOKENS = (16, 32, 64)  # widths that are compiled
LEAST_TOKENS = 5  # fewer have kernels of their own
# Most warpgroups of a block whose registers suffice, by their blocks of 64 rows and by tokens: with
# two planes, with more.
MOST_GROUPS = {
    (1, 16): (4, 4), (1, 32): (4, 3), (1, 64): (3, 3), (2, 16): (3, 3), (2, 32): (3, 3),
    (2, 64): (2, 0),
}  # fmt: skip
LEAST_STAGES, MOST_STAGES = 3, 10
MOST_HELD = 2  # slices of a warp of `place_arrange.cu`, of which a block has 32 at most
ARRANGE_BLOCKS = 8  # of a cluster
ARRANGE_TOKENS = 4  # of a cluster
RESERVED_BYTES = 1024  # barriers and factors, which the kernel declares itself
# Clocks of a processor for a slice of 64 rows and two planes: products; all else, which is hidden
# behind the products of other warpgroups.
PRODUCT_CLOCKS = {16: 150, 32: 160, 64: 290}
OTHER_CLOCKS = 250
UNIT_CLOCKS = 80  # of a slice, whatever its rows
BLOCK_CLOCKS = 5000  # of a block's start and its results, for each of `tall`
HANDING_CLOCKS = 500  # more if the parts of a block of rows are not alike


@dataclass(frozen=True)
class PlaceBatchPlan:
    """One launch of `place_batch.cu`.

    Attributes:
        kernel: ``place_batch``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        groups: warpgroups that multiply; one more fetches.
        tall: blocks of 64 rows of a warpgroup.
        stages: slices in shared memory.
        blocks: most blocks of the launch, which share the inputs of all rows.
    """

    kernel: str
    tokens: int
    groups: int
    tall: int
    stages: int
    blocks: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.groups * self.tall * 64


@dataclass(frozen=True)
class PlaceBatchWork:
    """How the blocks of a launch divide its units, the slices of all blocks of rows.

    Attributes:
        blocks: of the launch.
        share, extra: units of each block; the first ``extra`` have one more.
    """

    blocks: int
    share: int
    extra: int


def place_batch_work(plan: PlaceBatchPlan, layout: Layout) -> PlaceBatchWork:
    """The division for one weight."""
    units = -(-layout.rows // plan.rows) * layout.items * 2
    blocks = min(plan.blocks, units)
    return PlaceBatchWork(blocks, *divmod(units, blocks))


def place_batch_sums(plan: PlaceBatchPlan, work: PlaceBatchWork) -> tuple[int, int]:
    """Floats of sums that blocks hand to each other, and flags."""
    return work.blocks * plan.rows * plan.tokens, work.blocks * plan.groups * 4


def places_bytes(layout: Layout, tokens: int) -> int:
    """x for `place_batch.cu` (see place_arrange.cu)."""
    return layout.items * 2 * tokens * (512 + 32)


def places_held(layout: Layout) -> int:
    """Slices that a warp of `place_arrange.cu` takes."""
    return -(-layout.items * 2 // (ARRANGE_BLOCKS * 32))


def places_grid(layout: Layout, tokens: int) -> tuple[int, int, int]:
    """Blocks of `place_arrange.cu`, threads of a block, and blocks of a cluster."""
    slices, held = layout.items * 2, places_held(layout)
    cluster = min(ARRANGE_BLOCKS, slices)
    return tokens // ARRANGE_TOKENS * cluster, -(-slices // (cluster * held)) * 32, cluster


def place_batch_shared_bytes(plan: PlaceBatchPlan, layout: Layout) -> int:
    """Shared memory of a block: its ring, and results of each warp."""
    stage = plan.tokens * (512 + 32) + plan.rows // 16 * (layout.bits * 256 + layout.slots * 32)
    return plan.stages * stage + plan.groups * 4 * plan.tokens * 32


def place_batch_fits(
    plan: PlaceBatchPlan,
    layout: Layout,
    uniform: bool,
    scale_bytes: int,
    tokens: int,
    device: Card,
) -> bool:
    """Whether a plan can run, whoever made it."""
    return (
        device.capability == (9, 0)
        and not uniform
        and layout.bits > 1
        and is_short(layout, scale_bytes)
        and places_held(layout) <= MOST_HELD
        and tokens <= plan.tokens in PLACE_BATCH_TOKENS
        and (plan.tall, plan.tokens) in MOST_GROUPS
        and 2 <= plan.groups <= MOST_GROUPS[plan.tall, plan.tokens][layout.bits > 2]
        and plan.stages >= LEAST_STAGES
        and 1 <= plan.blocks <= device.processors  # all of them run at the same time
        and place_batch_shared_bytes(plan, layout) <= device.shared_bytes - RESERVED_BYTES
    )


@cache
def place_batch_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[PlaceBatchPlan, ...]:
    """Plans on Hopper for free levels, best guess first."""
    width = next((n for n in PLACE_BATCH_TOKENS if n >= tokens), 0)
    if not width or tokens < LEAST_TOKENS:
        return ()
    slices = layout.items * 2
    couples = -(-layout.bits // 2)
    scored = []
    for tall, groups in itertools.product((1, 2), (2, 3, 4)):
        row_blocks = -(-layout.rows // (groups * tall * 64))
        # All of the card, or as many blocks as come out even.
        even = row_blocks * max(1, device.processors // row_blocks)
        for blocks in {device.processors, min(device.processors, even)}:
            for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
                plan = PlaceBatchPlan("place_batch", width, groups, tall, stages, blocks)
                if place_batch_fits(plan, layout, uniform, scale_bytes, tokens, device):
                    break
            else:
                continue
            work = place_batch_work(plan, layout)
            products = couples * PRODUCT_CLOCKS[width]
            clocks = tall * max(groups * products, products + OTHER_CLOCKS) + UNIT_CLOCKS
            handed = work.extra > 0 or slices % work.share > 0
            score = (work.share + (work.extra > 0)) * clocks + tall * BLOCK_CLOCKS
            scored.append((score + handed * HANDING_CLOCKS, plan))
    scored.sort(key=lambda pair: pair[0])
    return tuple(dict.fromkeys(plan for _, plan in scored))
