"""Plans of `code_prefill.cu`: how blocks share a product of a hundred tokens and more on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import SLICE_INPUTS, Layout

PREFILL_TOKENS = 64  # beyond these it may be faster than the kernels that read weights once
STEP_GROUPS = 1024  # fewest groups of 4-bit free levels: their steps are good on average
TILES = ((256, 2), (128, 3))  # tokens and warpgroups of a block
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
    """

    kernel: str
    tokens: int
    groups: int
    stages: int
    cluster: int
    near_tiles: int


@cache
def prefill_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[PrefillPlan, ...]:
    """Plans for up to 4 bits in groups of 128 and more, best guess first."""
    fits = layout.bits <= 4 and scale_bytes == 2 and layout.group >= 128
    if not uniform and layout.bits == 4:
        fits = fits and layout.rows * layout.groups >= STEP_GROUPS
    fits = fits and arrange_bytes(layout) <= device.shared_bytes
    if device.capability != (9, 0) or not fits or tokens <= PREFILL_TOKENS:
        return ()
    scored = []
    for width, groups in TILES:
        token_tiles, row_blocks = -(-tokens // width), -(-layout.rows // (64 * groups))
        for cluster in (2, 1):
            clusters = -(-row_blocks // cluster) * token_tiles
            rounds = -(-clusters // (device.processors // cluster))
            # Clocks of a tile: products of its slices and of the sums, start and results.
            clocks = rounds * (layout.items * 2 * 1.03 * groups * width * 4 + 3000 + 8 * width)
            plan = PrefillPlan(
                "code_prefill", width, groups, most_stages(layout, uniform, width, groups, device),
                cluster, min(4, token_tiles),
            )
            scored.append((clocks, plan))
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)


def prefill_fits(
    plan: PrefillPlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan read from a file can run."""
    most = most_stages(layout, uniform, plan.tokens, plan.groups, device)
    return (
        bool(prefill_plans(layout, uniform, scale_bytes, tokens, device))
        and (plan.tokens, plan.groups) in TILES
        and 2 < plan.stages <= most
        and plan.cluster in (1, 2)
        and plan.near_tiles > 0
    )


def _stage_bytes(layout: Layout, uniform: bool, tokens: int, groups: int) -> int:
    """A slice in shared memory: x, planes, scales, integers of steps."""
    steps = 0 if uniform or layout.bits == 1 else 32
    return tokens * 256 + groups * 4 * (layout.bits * 256 + layout.slots * 32 + steps)


def _store_bytes(layout: Layout, uniform: bool, tokens: int, groups: int) -> int:
    """Results on their way to memory."""
    stored = 16 if layout.bits == 4 and not uniform and tokens == 256 else 32  # tokens at a time
    return groups * stored * 128


def most_stages(layout: Layout, uniform: bool, tokens: int, groups: int, device: Card) -> int:
    room = device.shared_bytes - RESERVED_BYTES - _store_bytes(layout, uniform, tokens, groups)
    return min(8, room // _stage_bytes(layout, uniform, tokens, groups))


def prefill_shared_bytes(plan: PrefillPlan, layout: Layout, uniform: bool) -> int:
    """Shared memory of `code_prefill.cu`: its ring, then tiles of results."""
    stage = _stage_bytes(layout, uniform, plan.tokens, plan.groups)
    return plan.stages * stage + _store_bytes(layout, uniform, plan.tokens, plan.groups)


def arrange_blocks(layout: Layout) -> int:
    """Blocks of a cluster of `prefill_arrange.cu`: one for every eight slices, up to eight."""
    return min(8, -(-layout.items * 2 // 8))


def arrange_bytes(layout: Layout) -> int:
    """Shared memory of `prefill_arrange.cu`: eight rows of x in a block's share of slices."""
    return (-(-layout.items * 2 // arrange_blocks(layout)) * SLICE_INPUTS * 2 + 16) * 8


def arranged_bytes(layout: Layout, uniform: bool, tokens: int, half: bool) -> int:
    """x for `code_prefill.cu` (see prefill.cuh); ``half``: results in half, not bf16."""
    slices = layout.items * 2
    terms = 4 if (uniform or layout.bits == 1) and half else 2
    return tokens * (slices * 256 + -(-slices // (64 // terms)) * 128)
