"""Plans of `code_prefill.cu`: how blocks share a product of a hundred tokens and more on Hopper."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import Layout

PREFILL_TOKENS = 64  # beyond these it may be faster than the kernels that read weights once
STEP_GROUPS = 1024  # fewest groups of 4-bit free levels: their steps are good on average
TILES = ((256, 2), (128, 3), (128, 2))  # tokens and warpgroups of a block
SHARES = (2, 4)  # clusters that may share a tile, where all of them run at once
SHARED_TOKENS = 128  # of such a tile
ARRANGE_SLICES = 16  # of a block that arranges x, times those that a lane holds
ARRANGE_TOKENS = 256  # up to so many are arranged by small blocks
RESERVED_BYTES = 512  # barriers, which the kernel declares itself


@dataclass(frozen=True)
class PrefillPlan:
    """One launch of `code_prefill.cu`.

    Attributes:
        kernel: ``code_prefill``.
        tokens: tokens of one block, the width of its tensor-core products.
        groups: warpgroups that multiply, 64 rows each; one more fetches.
        stages: slices in shared memory.
        cluster: blocks of other rows that fetch x for each other.
        near_tiles: token tiles of the same rows that run side by side.
        split: rounds of tiles, 0 to 2, in which all clusters share the inputs of what is left, so
            that none is idle.
        shares: clusters that share the inputs of every tile, and its results; 1, 2 or 4.
    """

    kernel: str
    tokens: int
    groups: int
    stages: int
    cluster: int
    near_tiles: int
    split: int = 0
    shares: int = 1

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.groups * 64


@cache
def prefill_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[PrefillPlan, ...]:
    """Plans for up to 4 bits in groups of 128 and more, best guess first."""
    fits = layout.bits <= 4 and scale_bytes == 2 and layout.group >= 128
    if not uniform and layout.bits == 4:
        fits = fits and layout.rows * layout.groups >= STEP_GROUPS
    fits = fits and arrange_held(layout) > 0
    if device.capability != (9, 0) or not fits or tokens <= PREFILL_TOKENS:
        return ()
    scored = []
    for (width, groups), cluster in itertools.product(TILES, (2, 1)):
        if (width, groups, cluster) == (128, 2, 2):
            continue  # never the fastest of those measured
        token_tiles, row_blocks = -(-tokens // width), -(-layout.rows // (64 * groups))
        tiles, most = -(-row_blocks // cluster) * token_tiles, device.processors // cluster
        # Clocks of a slice: of its products, or of what a warpgroup does between them.
        slowed = 1.05 if uniform or width > 128 else 1.35
        slice_clocks = max(groups * width * 4 * slowed, width * 4 + (900 if uniform else 1200))
        # Of a tile: products of its slices and of the sums, start and results.
        clocks = layout.items * 2 * slice_clocks + 3000 + 8 * width
        stages = most_stages(layout, uniform, width, groups, device)
        near = min(4, token_tiles)
        plan = PrefillPlan("code_prefill", width, groups, stages, cluster, near)
        for split in (0, 1, 2) if tiles % most else (0,):
            rounds = tiles / most if split else -(-tiles // most)
            # Those that share a tile hand their sums to one of them, one after the other.
            shared = tiles - max(0, tiles // most + 1 - split) * most
            handing = 14000 + 3000 * most / shared if split else 0
            scored.append((rounds * clocks + handing, replace(plan, split=split)))
        for shares in SHARES:
            if tiles * shares <= most and width == SHARED_TOKENS and layout.items >= shares:
                handing = 6000 + 1000 * shares
                scored.append((clocks / shares + handing, replace(plan, shares=shares)))
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)


def prefill_fits(
    plan: PrefillPlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan read from a file can run."""
    most = most_stages(layout, uniform, plan.tokens, plan.groups, device)
    tiles = prefill_tiles(plan, layout, tokens)
    return (
        bool(prefill_plans(layout, uniform, scale_bytes, tokens, device))
        and (plan.tokens, plan.groups) in TILES
        and 2 < plan.stages <= most
        and plan.cluster in (1, 2)
        and plan.near_tiles > 0
        and plan.split in (0, 1, 2)
        and (
            plan.shares == 1
            or plan.shares in SHARES
            and plan.split == 0
            and plan.tokens == SHARED_TOKENS
            and plan.shares <= layout.items
            and tiles * plan.shares <= device.processors // plan.cluster
        )
    )


def prefill_tiles(plan: PrefillPlan, layout: Layout, tokens: int) -> int:
    """Tiles of a cluster: blocks of rows times tiles of tokens."""
    row_blocks = -(-layout.rows // plan.rows)
    return -(-row_blocks // plan.cluster) * -(-tokens // plan.tokens)


def _stage_bytes(layout: Layout, uniform: bool, tokens: int, groups: int) -> int:
    """A slice in shared memory: x, planes, scales, integers of steps, tables of levels."""
    levels = not uniform and layout.bits > 1
    tables = levels and (layout.bits < 4 or tokens == 128)
    each = layout.bits * 256 + layout.slots * 32 + (32 if levels else 0) + (384 if tables else 0)
    return tokens * 256 + groups * 4 * each


def most_stages(layout: Layout, uniform: bool, tokens: int, groups: int, device: Card) -> int:
    room = device.shared_bytes - RESERVED_BYTES
    return min(8, room // _stage_bytes(layout, uniform, tokens, groups))


def prefill_shared_bytes(plan: PrefillPlan, layout: Layout, uniform: bool) -> int:
    """Shared memory of `code_prefill.cu`: its ring."""
    return plan.stages * _stage_bytes(layout, uniform, plan.tokens, plan.groups)


@dataclass(frozen=True)
class PrefillWork:
    """How the clusters of a launch divide tiles, each of ``units`` slices and parts of sums.

    Attributes:
        clusters: of the launch.
        whole: tiles that are taken from end to end, one after the other.
        share, extra: units of the others for each cluster; the first ``extra`` have one more.
    """

    clusters: int
    whole: int
    share: int
    extra: int


def prefill_work(
    plan: PrefillPlan, layout: Layout, uniform: bool, tokens: int, half: bool, device: Card
) -> PrefillWork:
    """``half``: results in half, not bf16."""
    tiles = prefill_tiles(plan, layout, tokens)
    most = device.processors // plan.cluster
    if plan.shares > 1:
        return PrefillWork(tiles * plan.shares, 0, 0, 0)
    if plan.split == 0 or tiles % most == 0:
        return PrefillWork(min(most, tiles), tiles, 0, 0)
    whole = max(0, tiles // most + 1 - plan.split) * most
    units = layout.items * 2 + _sum_parts(layout, uniform, half)
    share, extra = divmod((tiles - whole) * units, most)
    return PrefillWork(most, whole, share, extra)


def shared_sums(plan: PrefillPlan, work: PrefillWork) -> tuple[int, int]:
    """Floats of sums that blocks hand to each other, and flags; none if every tile is whole."""
    if work.share + work.extra == 0 and plan.shares == 1:
        return 0, 0
    blocks = work.clusters * plan.cluster
    return blocks * plan.rows * plan.tokens, blocks * plan.rows // 16


def arrange_held(layout: Layout) -> int:
    """Slices of a token that two lanes of `prefill_arrange.cu` take; 0: a row is too long."""
    slices = layout.items * 2
    return next((held for held in (1, 2, 4) if slices <= held * ARRANGE_SLICES * 8), 0)


def arrange_blocks(layout: Layout, warps: int = 8) -> int:
    """Blocks of ``warps`` warps in a cluster that arranges x, at most eight."""
    return -(-layout.items * 2 // (arrange_held(layout) * 2 * warps))


def arrange_warps(layout: Layout, tokens: int) -> int:
    """Warps of a block of `prefill_arrange.cu`: few where few tokens would fill few processors."""
    if tokens > ARRANGE_TOKENS:
        return 8
    return -(-layout.items * 2 // (arrange_held(layout) * ARRANGE_SLICES))


def arranged_bytes(layout: Layout, uniform: bool, tokens: int, half: bool) -> int:
    """x for `code_prefill.cu` (see prefill.cuh); ``half``: results in half, not bf16."""
    return tokens * (layout.items * 512 + _sum_parts(layout, uniform, half) * 128)


def _sum_parts(layout: Layout, uniform: bool, half: bool) -> int:
    """Parts of the sums of x over slices."""
    terms = 4 if (uniform or layout.bits == 1) and half else 2
    return -(-layout.items * 2 // (64 // terms))
