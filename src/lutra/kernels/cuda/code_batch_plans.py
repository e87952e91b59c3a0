"""Plans of `code_batch.cu`: how blocks share a product of 8 to 64 tokens with uniform levels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import ITEM_INPUTS, Layout, is_short

CODE_BATCH_TOKENS = (8, 16, 32, 64)  # widths that are compiled
#: Most warpgroups of a block whose registers suffice, by their blocks of 64 rows and by width.
MOST_GROUPS = {1: {8: 3, 16: 3, 32: 3, 64: 3}, 2: {8: 3, 16: 3, 32: 3, 64: 2}}
LEAST_STAGES, MOST_STAGES = 4, 10  # a warp reads three stages ahead of what it multiplies
MOST_INPUTS = 65536  # of a row, for `prefill_arrange.cu`
CHUNK_SLICES = 16  # whose scales and sums of x a block fetches at once
RESERVED_BYTES = 1024  # what the kernel declares itself
# Clocks of a processor for a slice of 64 rows: of all that runs side by side, and of one alone.
SLICE_CLOCKS = {8: 190, 16: 210, 32: 240, 64: 340}
ALONE_CLOCKS = {8: 500, 16: 550, 32: 600, 64: 800}
BLOCK_CLOCKS = 6000  # of a block's start, its sums and its results


@dataclass(frozen=True)
class CodeBatchPlan:
    """One launch of `code_batch.cu`.

    Attributes:
        kernel: ``code_batch``.
        tokens: tokens that the kernel is compiled for; it takes as many or fewer.
        groups: warpgroups that multiply; one more fetches.
        k_groups: those of them that take the same rows and share the inputs.
        tall: blocks of 64 rows of a warpgroup.
        stages: slices in shared memory, times ``k_groups``.
        cluster: blocks that split the inputs.
    """

    kernel: str
    tokens: int
    groups: int
    k_groups: int
    tall: int
    stages: int
    cluster: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return self.groups // self.k_groups * self.tall * 64

    @property
    def split(self) -> bool:
        """Whether the inputs are split; if not, a block takes one block of rows after another."""
        return self.cluster > 1 or self.k_groups > 1


def code_batch_row_blocks(plan: CodeBatchPlan, layout: Layout) -> int:
    return -(-layout.rows // plan.rows)


def code_batch_blocks(plan: CodeBatchPlan, layout: Layout, device: Card) -> int:
    """Blocks of the launch."""
    row_blocks = code_batch_row_blocks(plan, layout)
    return row_blocks * plan.cluster if plan.split else min(row_blocks, device.processors)


def _stage_bytes(plan: CodeBatchPlan, layout: Layout) -> int:
    """x and planes of a slice or sums of x and scales of a chunk, for all shares of the inputs."""
    of_tile = max(layout.bits * 256, CHUNK_SLICES * 64)
    return plan.k_groups * (plan.tokens * 256 + plan.rows // 16 * of_tile)


def code_batch_shared_bytes(plan: CodeBatchPlan, layout: Layout) -> int:
    """Shared memory of a block: its ring and what it makes of scales; then its sums."""
    kept = plan.groups * plan.tall * 4 * (CHUNK_SLICES + 1) * 64
    sums = plan.k_groups * plan.tokens * (plan.rows + 4) * 4 if plan.split else 0
    return max(plan.stages * _stage_bytes(plan, layout) + kept, sums)


def code_batch_fits(
    plan: CodeBatchPlan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan can run, whoever made it."""
    return (
        device.capability == (9, 0)
        and (uniform or layout.bits == 1)
        and is_short(layout, scale_bytes)
        and layout.items * ITEM_INPUTS <= MOST_INPUTS
        and tokens <= plan.tokens in CODE_BATCH_TOKENS
        and plan.tall in MOST_GROUPS
        and 2 <= plan.groups <= MOST_GROUPS[plan.tall][plan.tokens]
        and plan.k_groups > 0 == plan.groups % plan.k_groups
        and plan.stages >= LEAST_STAGES
        and 1 <= plan.cluster <= min(8, layout.items)
        and not (plan.k_groups == 3 and plan.tall == 2 and plan.tokens == 32)  # registers
        and code_batch_shared_bytes(plan, layout) <= device.shared_bytes - RESERVED_BYTES
    )


@cache
def code_batch_plans(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[CodeBatchPlan, ...]:
    """Plans on Hopper for uniform levels, best guess first."""
    width = next((n for n in CODE_BATCH_TOKENS if n >= tokens), 0)
    if not width or tokens <= CODE_BATCH_TOKENS[0] // 2:
        return ()
    slices = layout.items * 2
    scored = []
    for tall, groups, k_groups, cluster in itertools.product(
        (1, 2), (2, 3), (1, 2, 3), (1, 2, 3, 4)
    ):
        if groups % k_groups:
            continue
        for stages in range(MOST_STAGES, LEAST_STAGES - 1, -1):
            plan = CodeBatchPlan("code_batch", width, groups, k_groups, tall, stages, cluster)
            if code_batch_fits(plan, layout, uniform, scale_bytes, tokens, device):
                break
        else:
            continue
        usable = device.processors * 9 // 10 if cluster > 2 else device.processors
        rounds = -(-code_batch_row_blocks(plan, layout) * cluster // usable)
        steps = -(-slices // (cluster * k_groups))
        clocks = max(groups * tall * SLICE_CLOCKS[width], tall * ALONE_CLOCKS[width])
        score = rounds * (steps * clocks + BLOCK_CLOCKS) + 400 * (cluster + k_groups)
        scored.append((score, plan))
    scored.sort(key=lambda pair: pair[0])
    return tuple(plan for _, plan in scored)
