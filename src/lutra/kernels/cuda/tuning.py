"""Which plan: measured where it has been, guessed by rule elsewhere, always with a reason.

A table is a JSON file of rows ``{shape, format, tokens, plan, us}`` for one kind of card. The
package carries one for each card that it was measured on (``tuned/``); `lutra.bench.cuda.tune`
makes one for the card at hand, in ``$LUTRA_CACHE/tuned`` (see :mod:`lutra.kernels.cuda.nvrtc`),
which comes first.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.kernels.cuda.code_batch_plans import (
    CodeBatchPlan,
    code_batch_fits,
    code_batch_plans,
)
from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import Layout
from lutra.kernels.cuda.nvrtc import cache_folder, write_whole
from lutra.kernels.cuda.place_batch_plans import (
    PlaceBatchPlan,
    place_batch_fits,
    place_batch_plans,
)
from lutra.kernels.cuda.plans import (
    CODE_REGISTERS,
    MAX_FEW_TOKENS,
    CodePlan,
    DensePlan,
    FewPlan,
    FieldPlan,
    Plan,
    code_plans,
    code_shared_bytes,
    dense_plans,
    few_plans,
    few_tokens_limit,
    field_plans,
    field_shared_bytes,
)
from lutra.kernels.cuda.prefill_plans import (
    PREFILL_TOKENS,
    PrefillPlan,
    prefill_fits,
    prefill_plans,
)
from lutra.kernels.cuda.sparse_plans import SparsePlan, sparse_fits, sparse_plans
from lutra.kernels.cuda.stream_plans import StreamPlan, stream_fits, stream_plans

logger = logging.getLogger(__name__)

# By rule: most tokens for which a kernel is taken, by whether a weight is one code (True) or planes
# (False). From the measured tables, where the kernels cross on the larger shapes; small weights
# stay with the kernels for few tokens, which start faster.
FEW_TOKENS = {True: 4, False: 8}
FEW_TOKENS_SMALL = {True: 8, False: 16}
SMALL_WEIGHTS = 24 << 20
CODE_TOKENS = 8  # beyond these `code_linear` is faster, where it runs
PLACE_TOKENS = {2: 64, 3: 32, 4: 64}  # by planes; beyond these `code_linear` is faster
FIELD_TOKENS = {True: 320, False: 128}
PREFILL_RESULTS = 3072  # of a processor: with fewer, `code_linear` starts faster
_PLANS: dict[str, Callable[..., Plan]] = {
    "binary_linear": FewPlan, "byte_linear": FewPlan, "exact_linear": FewPlan,
    "stream_linear": StreamPlan, "sparse_linear": SparsePlan, "code_batch": CodeBatchPlan,
    "place_batch": PlaceBatchPlan, "field_linear": FieldPlan, "code_linear": CodePlan,
    "code_prefill": PrefillPlan,
    "dense": DensePlan,
}


def format_name(layout: Layout, uniform: bool) -> str:
    """Name of a format in a table; the group is the kernels' (256: whole items or a row)."""
    return f"{'ubcq' if uniform else 'bcq'}{layout.bits}g{layout.group}"


def table_name(device: Card) -> str:
    return re.sub(r"\W+", "_", device.name).strip("_") + ".json"


@cache
def _table(name: str) -> dict[tuple[str, str], dict[int, tuple[Plan, str]]]:
    """Measured plans by shape and format, then by tokens; later files win."""
    table: dict[tuple[str, str], dict[int, tuple[Plan, str]]] = {}
    shipped = Path(__file__).parent / "tuned" / name
    for path in (shipped, user_table(name)):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            for row in rows:
                plan = _PLANS[row["plan"]["kernel"]](**row["plan"])
                key = (row["shape"], row["format"])
                reason = f"fastest of those measured ({row['us']} us, {path.name})"
                table.setdefault(key, {})[int(row["tokens"])] = (plan, reason)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the table of measured kernels %s is not used: %r", path, error)
    return table


def user_table(name: str) -> Path:
    return cache_folder().parent / "tuned" / name


@cache
def choose(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> tuple[Plan, str]:
    """The plan for a number of tokens, and why."""
    measured = _table(table_name(device)).get(
        (f"{layout.rows}x{layout.inputs}", format_name(layout, uniform)), {}
    )
    at = min((t for t in measured if t >= tokens), default=None)
    if at is not None and at < 2 * tokens:  # tables are made at powers of two
        plan, reason = measured[at]
        if _fits(plan, layout, uniform, scale_bytes, tokens, device):
            return plan, reason
    codes = uniform and layout.bits <= 4
    field = field_plans(layout, uniform, tokens, device)
    few_limit = min(few_tokens_limit(layout, scale_bytes, device), MAX_FEW_TOKENS)
    limits = FEW_TOKENS_SMALL if layout.rows * layout.inputs < SMALL_WEIGHTS else FEW_TOKENS
    few_most = limits[codes] if field else MAX_FEW_TOKENS
    code = code_plans(layout, uniform, scale_bytes, tokens, device)
    if code:
        few_most = min(few_most, CODE_TOKENS)
    sparse = sparse_plans(layout, uniform, scale_bytes, tokens, device)
    stream = stream_plans(layout, uniform, scale_bytes, tokens, device)
    if stream or sparse:
        few_most = min(few_most, limits[True])
    if few_limit and tokens <= few_most:
        return few_plans(layout, scale_bytes, min(tokens, few_limit), device)[0], (
            f"by rule: up to {few_most} tokens"
        )
    if sparse:
        return sparse[0], f"by rule: up to {sparse[0].tokens} tokens on {device.arch}"
    if stream:
        return stream[0], f"by rule: up to {stream[0].tokens} tokens on {device.arch}"
    place = place_batch_plans(layout, uniform, scale_bytes, tokens, device)
    if place and tokens <= PLACE_TOKENS[layout.bits]:
        return place[0], (
            f"by rule: up to {PLACE_TOKENS[layout.bits]} tokens on {device.arch}"
        )
    prefill = prefill_plans(layout, uniform, scale_bytes, tokens, device)
    if prefill and layout.rows * tokens >= PREFILL_RESULTS * device.processors:
        return prefill[0], f"by rule: more than {PREFILL_TOKENS} tokens that fill {device.arch}"
    if code:
        return code[0], f"by rule: more than {few_most} tokens on {device.arch}"
    if field and tokens <= FIELD_TOKENS[codes]:
        return field[0], f"by rule: up to {FIELD_TOKENS[codes]} tokens on {device.arch}"
    return dense_plans(layout)[0], "by rule: more tokens than the fused kernels are for"


def _fits(
    plan: Plan, layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> bool:
    """Whether a plan read from a file can run, whichever version made it."""
    if isinstance(plan, FewPlan):
        return plan in few_plans(layout, scale_bytes, tokens, device)
    if isinstance(plan, CodeBatchPlan):
        return code_batch_fits(plan, layout, uniform, scale_bytes, tokens, device)
    if isinstance(plan, PlaceBatchPlan):
        return place_batch_fits(plan, layout, uniform, scale_bytes, tokens, device)
    if isinstance(plan, StreamPlan):
        return stream_fits(plan, layout, uniform, scale_bytes, tokens, device)
    if isinstance(plan, SparsePlan):
        return sparse_fits(plan, layout, uniform, scale_bytes, tokens, device)
    if isinstance(plan, FieldPlan):
        possible = field_plans(layout, uniform, tokens, device)
        need = field_shared_bytes(plan.tokens, plan.warpgroups, plan.stages)
        return (
            any(plan.tokens == other.tokens for other in possible)
            and plan.row_blocks * plan.warpgroups * 64 >= layout.rows
            and need <= plan.shared_bytes <= device.shared_bytes
            and plan.stages > 2
            and 1 <= plan.cluster <= min(8, layout.items * 2)
        )
    if isinstance(plan, PrefillPlan):
        return prefill_fits(plan, layout, uniform, scale_bytes, tokens, device)
    if isinstance(plan, CodePlan):
        need = code_shared_bytes(layout, uniform, plan.tokens, plan.warpgroups, plan.stages)
        return (
            bool(code_plans(layout, uniform, scale_bytes, tokens, device))
            and plan.tokens in CODE_REGISTERS
            and 1 <= plan.warpgroups <= 7
            and plan.stages > 3
            and plan.ahead in (0, 1)
            and plan.near_tiles > 0
            and need <= device.shared_bytes
            and 1 <= plan.cluster <= min(8, layout.items * 2)
        )
    return plan.rows % 16 == 0 and plan.rows > 0


def candidates(
    layout: Layout, uniform: bool, scale_bytes: int, tokens: int, device: Card
) -> list[Plan]:
    """Plans worth measuring."""
    plans: list[Plan] = list(few_plans(layout, scale_bytes, tokens, device))
    if tokens > 2:
        plans += sparse_plans(layout, uniform, scale_bytes, tokens, device)
    if tokens > 4:
        plans += stream_plans(layout, uniform, scale_bytes, tokens, device)[:8]
        plans += code_batch_plans(layout, uniform, scale_bytes, tokens, device)[:8]
        plans += place_batch_plans(layout, uniform, scale_bytes, tokens, device)[:6]
        plans += code_plans(layout, uniform, scale_bytes, tokens, device)[:8]
    plans += prefill_plans(layout, uniform, scale_bytes, tokens, device)
    if tokens > 1 and not any(isinstance(plan, CodePlan) for plan in plans):
        plans += field_plans(layout, uniform, tokens, device)[:6]
    if tokens > 32:
        plans += dense_plans(layout)
    return plans


def measure(
    weights: Sequence[tuple[Tensor, Tensor]], layout: Layout, uniform: bool, tokens: Sequence[int],
    dtype: torch.dtype, device: Card, time_us: Callable[[Callable[[], None]], float],
) -> list[dict[str, Any]]:
    """Rows of a table for one shape and format.

    Args:
        weights: distinct prepared weights, together larger than the caches.
        tokens: numbers of tokens to measure.
        time_us: microseconds of a function that multiplies every weight once.
    """
    from lutra.kernels.cuda.products import run

    rows = []
    scale_bytes = weights[0][1].dtype.itemsize
    for count in tokens:
        x = torch.randn(count, layout.inputs, device=weights[0][0].device, dtype=dtype)
        y = x.new_empty(count, layout.rows)
        best: tuple[float, Plan] | None = None
        for plan in candidates(layout, uniform, scale_bytes, count, device):

            def all_weights(plan: Plan = plan, x: Tensor = x, y: Tensor = y) -> None:
                for planes, scales in weights:
                    run(plan, x, planes, scales, None, y, layout, uniform)

            us = time_us(all_weights) / len(weights)
            logger.info("%s %d tokens: %.2f us %s", format_name(layout, uniform), count, us, plan)
            if best is None or us < best[0]:
                best = us, plan
        assert best is not None, "the dense plan runs everywhere"
        rows.append({
            "shape": f"{layout.rows}x{layout.inputs}",
            "format": format_name(layout, uniform),
            "tokens": count,
            "us": round(best[0], 2),
            "plan": asdict(best[1]),
        })
    return rows


def median_graph_us(work: Callable[[], None], replays: int = 9) -> float:
    """Median microseconds of ``work`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def save(rows: list[dict[str, Any]], device: Card, path: Path) -> None:
    """Add rows to a table, replacing those of the same shape, format and tokens."""
    def key(row: dict[str, Any]) -> tuple[str, str, int]:
        return row["shape"], row["format"], row["tokens"]

    try:
        old = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        old = []
    merged = {key(row): row for row in (*old, *rows)}
    content = {"card": device.name, "rows": [merged[k] for k in sorted(merged)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n ".join(json.dumps(row) for row in content["rows"])
    text = f'{{"card": {json.dumps(device.name)}, "rows": [\n {lines}\n]}}\n'
    write_whole(path, text.encode())
    _table.cache_clear()
    choose.cache_clear()
