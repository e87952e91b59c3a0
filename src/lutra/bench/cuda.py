"""Time of one product on the GPU: our kernels beside cuBLAS and every peer that is installed.

Protocol: random bit patterns and activations; as many distinct copies of the weight as exceed eight
times the L2 cache, multiplied in turn for a millisecond or more in one CUDA graph; replays timed by
events, median of 15 (5 where a product takes long). Every implementation also multiplies one weight
whose product is known in float64. The streaming read limit is measured in the same run.

Bytes (`gbps`) are those of the stored tensors of an implementation: packed weight, scales, offsets.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row

logger = logging.getLogger(__name__)

REPLAYS, LEAST_REPLAYS = 15, 5
WARM_REPLAYS = 3
GRAPH_US = 1000  # at least, of one graph
REPLAY_US = 60_000  # for all replays of one measurement, if that leaves enough of them
CACHE_MULTIPLE = 8  # distinct weights per replay, in L2 sizes
MAX_CALLS = 400
KNOWN_ROWS = 2048  # rows compared with float64

Call = Callable[[Tensor], Tensor]


@dataclass
class Candidate:
    """One implementation on one shape.

    Attributes:
        name: implementation, ours beginning with ``lutra``.
        bits, group: stored bits and group size (0: none).
        bytes: stored bytes of one weight.
        make: builds one weight with random content and gives back the call ``x -> y``.
        known: builds a weight and gives the call and the first rows of the stored weight in
            float64; None if that cannot be known.
        program: which kernel multiplies a number of tokens, and why; ours only.
        compile_ahead: compiles what products of these numbers of tokens launch; ours only.
    """

    name: str
    bits: int
    group: int
    bytes: int
    make: Callable[[], Call]
    known: Callable[[], tuple[Call, Tensor]] | None = None
    program: Callable[[int], tuple[str, str]] | None = None
    compile_ahead: Callable[[Sequence[int]], None] | None = None


@dataclass
class Measured:
    """One implementation on one shape at one batch.

    Attributes:
        us: microseconds of a call over distinct weights.
        error: relative error against float64; not a number where that is not known.
        rounding: that of rounding the exact result to the dtype of the activations.
    """

    batch: int
    us: float
    error: float = math.nan
    rounding: float = math.nan


def read_limit_gbps(device: torch.device, gibibytes: int = 4) -> float:
    """Bytes per second (in 1e9) at which a large float32 tensor is summed."""
    data = torch.ones(gibibytes << 28, dtype=torch.float32, device=device)
    times = [_timed(lambda: data.sum(), device) for _ in range(10)]
    return data.numel() * 4 / statistics.median(times[3:]) / 1e3


def run(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    bits: Sequence[int],
    group_sizes: Sequence[int],
    peers: bool | Sequence[str] = True,
    dtype: torch.dtype = torch.float16,
    kinds: Sequence[str] = ("bcq", "ubcq"),
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """Measure every implementation on every shape ``(out, in)`` and batch.

    Args:
        shapes: weight shapes ``(out_features, in_features)``.
        batches: numbers of tokens.
        bits, group_sizes: formats of ours and of the peers that have them.
        peers: all installed peers, none, or those named.
        dtype: of the activations.
        kinds: ``bcq`` (free levels) and ``ubcq`` (uniform levels).
        on_rows: called with the rows of each implementation on each shape as they come.

    Returns:
        ``read_limit_gbps``, ``machine``, ``left_out`` (peers that could not run:
        ``implementation, shape, bits, reason``) and ``rows``: ``implementation, shape, batch,
        bits, group, us, gbps, speedup_vs_dense, relative_error, rounding_error`` (of the exact
        result, rounded to ``dtype``) and ``kernel`` (which of ours ran).

    Raises:
        KernelError: there is no CUDA device, or our kernels cannot run on it.
    """
    if not torch.cuda.is_available():
        raise KernelError("no CUDA device: run this where there is one, or pass --device cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    wanted = None if peers is True else ([] if peers is False else list(peers))
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    limit = read_limit_gbps(device)
    for out_features, in_features in shapes:
        shape = (out_features, in_features)
        candidates = [_dense(*shape, dtype, device)]
        for b in bits:
            for group in group_sizes:
                candidates += [_ours(kind, *shape, b, group, dtype, device) for kind in kinds]
                candidates += _peers(wanted, *shape, b, group, dtype, device)
        dense: dict[int, float] = {}
        with ThreadPoolExecutor() as pool:
            ahead = [c.compile_ahead for c in candidates if c.compile_ahead is not None]
            list(pool.map(lambda compile_ahead: compile_ahead(batches), ahead))
        for candidate in candidates:
            before = len(rows)
            try:
                for found in _measure(candidate, batches, in_features, dtype, properties):
                    if candidate.name == "cublas":
                        dense[found.batch] = found.us
                    rows.append(_row(candidate, shape, found, dense[found.batch]))
            except Exception as failure:  # a peer that fails is a result, not the end of the run
                if candidate.name.startswith(("lutra", "cublas")):
                    raise
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
                logger.warning("%s fails on %dx%d: %s", candidate.name, *shape, reason)
                left_out.append(
                    {
                        "implementation": candidate.name,
                        "shape": f"{out_features}x{in_features}",
                        "bits": candidate.bits,
                        "reason": reason,
                    }
                )
            if on_rows is not None:
                on_rows(rows[before:])
    order = {f"{o}x{i}": n for n, (o, i) in enumerate(shapes)}
    rows.sort(key=lambda row: (order[row["shape"]], row["batch"]))
    return {
        "read_limit_gbps": round(limit, 1),
        "machine": _machine(device),
        "left_out": left_out,
        "rows": rows,
    }


def _row(
    candidate: Candidate, shape: tuple[int, int], found: Measured, dense_us: float
) -> dict[str, Any]:
    return {
        "implementation": candidate.name,
        "shape": f"{shape[0]}x{shape[1]}",
        "batch": found.batch,
        "bits": candidate.bits,
        "group": candidate.group,
        "us": round(found.us, 3),
        "gbps": round(candidate.bytes / found.us / 1e3, 1),
        "speedup_vs_dense": round(dense_us / found.us, 3),
        "relative_error": _three_digits(found.error),
        "rounding_error": _three_digits(found.rounding),
        "kernel": candidate.program(found.batch)[0] if candidate.program else None,
    }


def _machine(device: torch.device) -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in (
        "cuda-bindings",
        "nvidia-cuda-nvrtc",
        "triton",
        "humming-kernels",
        "gemlite",
        "fbgemm-gpu-genai",
        "bitsandbytes",
    ):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"card": torch.cuda.get_device_name(device), **versions}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds of one call, by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e3


def _measure(
    candidate: Candidate,
    batches: Sequence[int],
    in_features: int,
    dtype: torch.dtype,
    properties: Any,
) -> Iterator[Measured]:
    """Time over distinct weights, and error, at every batch."""
    copies = -(-CACHE_MULTIPLE * properties.L2_cache_size // candidate.bytes) + 1
    copies = max(1, min(MAX_CALLS, copies))
    calls = [candidate.make() for _ in range(copies)]
    known = candidate.known() if candidate.known else None
    for batch in batches:
        x = torch.randn(batch, in_features, device="cuda", dtype=dtype)

        def every_weight(calls: list[Call] = calls, x: Tensor = x) -> None:
            for call in calls:
                call(x)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            every_weight()
            once_us = _timed(every_weight, x.device)
        torch.cuda.current_stream().wait_stream(stream)
        # The launch of a graph of few calls would count, which is nothing beside a model's.
        rounds = max(1, math.ceil(GRAPH_US / once_us))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                every_weight()
        warm = [_timed(graph.replay, x.device) for _ in range(WARM_REPLAYS)]
        replays = min(REPLAYS, max(LEAST_REPLAYS, int(REPLAY_US / warm[-1])))
        times = [_timed(graph.replay, x.device) for _ in range(replays)]
        us = statistics.median(times) / (copies * rounds)
        measured = Measured(batch, us)
        if known is not None:
            call, weight_OI = known
            exact = x.double() @ weight_OI.T
            measured.error = _relative_error(call(x)[:, : weight_OI.shape[0]], exact)
            measured.rounding = _relative_error(exact.to(dtype), exact)
        yield measured


def _three_digits(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.3g}")


def _relative_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def _dense(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Candidate:
    def weight() -> Tensor:
        return torch.randn(out_features, in_features, device=device, dtype=dtype)

    def make() -> Call:
        w = weight()
        return lambda x: torch.nn.functional.linear(x, w)

    def known() -> tuple[Call, Tensor]:
        w = weight()
        return lambda x: torch.nn.functional.linear(x, w), w[:KNOWN_ROWS].double()

    return Candidate("cublas", 16, 0, 2 * out_features * in_features, make, known)


def _ours(
    kind: str,
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Candidate:
    from lutra.kernels.dispatch import LinearSpec, choose

    group_size = in_features if group <= 0 else group
    uniform = kind == "ubcq" and bits > 1
    spec = LinearSpec(out_features, in_features, bits, group_size, uniform, device, dtype)
    choice = choose(spec)
    kernel = choice.kernel
    if kernel.name == "reference":
        raise KernelError(f"no CUDA kernel for {spec}: {choice.reason}")

    def random_weight() -> BitPlanes:
        return random_planes(out_features, in_features, bits, group_size, uniform, device)

    def make() -> Call:
        prepared = kernel.prepare(random_weight(), spec)
        return lambda x: kernel.linear(x, prepared, None, spec)

    def known() -> tuple[Call, Tensor]:
        weight = random_weight()
        prepared = kernel.prepare(weight, spec)
        rows = slice(0, KNOWN_ROWS)
        part = BitPlanes(
            weight.planes[:, rows],
            weight.scale[:, rows],
            weight.offset[rows],
            in_features,
            group_size,
        )
        return (lambda x: kernel.linear(x, prepared, None, spec)), part.unpack(torch.float64)

    def compile_ahead(batches: Iterable[int]) -> None:
        from lutra.kernels.cuda import nvrtc
        from lutra.kernels.cuda.launch import card

        assert device.index is not None
        for name, defines in kernel.instances(spec, batches):
            nvrtc.compile_cubin(name, defines, card(device.index).arch)

    size = stored_bytes(out_features, in_features, bits, group_size, uniform)
    return Candidate(
        f"lutra-{kind}",
        bits,
        group,
        size,
        make,
        known,
        lambda batch: kernel.describe(spec, batch),
        compile_ahead,
    )


def random_planes(
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    uniform: bool,
    device: torch.device,
) -> BitPlanes:
    """A weight of random bits, with scales of plausible size in float16."""
    words, groups = words_per_row(in_features), groups_per_row(in_features, group_size)
    limits = torch.iinfo(torch.int32)
    planes = torch.randint(
        limits.min, limits.max, (bits, out_features, words), dtype=torch.int32, device=device
    )
    scales = 1 if uniform else bits
    scale = torch.rand(scales, out_features, groups, device=device) * 0.02 + 0.01
    if not uniform:
        scale = scale * 0.5 ** torch.arange(bits, device=device)[:, None, None]
    offset = torch.randn(out_features, groups, device=device) * 0.005
    return BitPlanes(planes, scale.half(), offset.half(), in_features, group_size)


def stored_bytes(
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool
) -> int:
    """Bytes of the stored tensors: planes, float16 scales and offsets."""
    groups = groups_per_row(in_features, group_size)
    scales = (1 if uniform else bits) + 1
    return out_features * (4 * bits * words_per_row(in_features) + 2 * scales * groups)


def tune(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    bits: Sequence[int],
    group_sizes: Sequence[int],
    kinds: Sequence[str] = ("bcq", "ubcq"),
    path: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure the plans of our own kernels and keep the fastest of each in a table.

    Args:
        path: table to extend; default the user's, which later processes read.

    Returns:
        The new rows of the table (see :mod:`lutra.kernels.cuda.tuning`).
    """
    from lutra.kernels.cuda import tuning
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import add_steps

    device = torch.device("cuda", torch.cuda.current_device())
    gpu = card(torch.cuda.current_device())
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    rows = []
    for out_features, in_features in shapes:
        for b in bits:
            for group in group_sizes:
                for kind in kinds:
                    group_size = in_features if group <= 0 else group
                    uniform = kind == "ubcq" and b > 1
                    layout = layout_of(out_features, in_features, b, group_size, uniform)
                    size = stored_bytes(out_features, in_features, b, group_size, uniform)
                    weights = []
                    for _ in range(min(MAX_CALLS, CACHE_MULTIPLE * l2_bytes // size + 1)):
                        weight = random_planes(
                            out_features, in_features, b, group_size, uniform, device
                        )
                        planes, scales = to_kernel_order(weight, layout)
                        torch.cuda.synchronize()  # before a kernel reads what another has written
                        weights.append((planes, add_steps(scales, layout, uniform)))
                    torch.cuda.synchronize()
                    rows += tuning.measure(
                        weights,
                        layout,
                        uniform,
                        batches,
                        torch.float16,
                        gpu,
                        tuning.median_graph_us,
                    )
                    del weights
    name = tuning.table_name(gpu)
    tuning.save(rows, gpu, path or tuning.user_table(name))
    return rows


def _peers(
    wanted: list[str] | None,
    out_features: int,
    in_features: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Candidate]:
    from lutra.bench.peers_cuda import PEERS

    found = []
    for name, build in PEERS.items():
        if wanted is None or name in wanted:
            candidate = build(out_features, in_features, bits, group, dtype, device)
            if candidate is not None:
                found.append(candidate)
    return found
