"""Time of one product on the GPU: our kernels beside cuBLAS and every peer that is installed.

Protocol: random bit patterns and activations; as many distinct copies of the weight as exceed eight
times the L2 cache, one call per copy captured in a CUDA graph, replays timed by events, median. Every
implementation first multiplies one weight whose product is known in float64. The streaming-read limit
is measured in the same run.

Bytes (`gbps`) are those of the stored tensors of each implementation: packed weight, scales, offsets.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError

logger = logging.getLogger(__name__)

REPLAYS = 15
WARM_REPLAYS = 3
CACHE_MULTIPLE = 8  # distinct weights per replay, in L2 sizes
MAX_CALLS = 400


@dataclass
class Candidate:
    """One implementation on one shape.

    Attributes:
        name: implementation, ours beginning with ``lutra``.
        bits, group: stored bits and group size (0: none).
        bytes: stored bytes of one weight.
        make: builds one weight with random content and gives back the call ``x -> y``.
        error: relative error against float64 on one weight, or None if it cannot be known.
    """

    name: str
    bits: int
    group: int
    bytes: int
    make: Callable[[], Callable[[Tensor], Tensor]]
    error: Callable[[Tensor], float] | None = None


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
) -> dict[str, Any]:
    """Measure every implementation on every shape ``(out, in)`` and batch.

    Args:
        shapes: weight shapes ``(out_features, in_features)``.
        batches: numbers of tokens.
        bits, group_sizes: formats of ours and of the peers that have them.
        peers: all installed peers, none, or those named.
        dtype: of the activations.
        kinds: ``bcq`` (free levels) and ``ubcq`` (uniform levels).

    Returns:
        ``read_limit_gbps``, ``machine`` and ``rows``: ``implementation, shape, batch, bits, group,
        us, gbps, speedup_vs_dense, relative_error``.

    Raises:
        KernelError: there is no CUDA device, or our kernels cannot run on it.
    """
    if not torch.cuda.is_available():
        raise KernelError("no CUDA device: run this where there is one, or pass --device cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    wanted = None if peers is True else ([] if peers is False else list(peers))
    rows: list[dict[str, Any]] = []
    limit = read_limit_gbps(device)
    for out_features, in_features in shapes:
        for batch in batches:
            x = torch.randn(batch, in_features, device=device, dtype=dtype)
            dense = None
            candidates = [_dense(out_features, in_features, x)]
            for b in bits:
                for group in group_sizes:
                    for kind in kinds:
                        candidates.append(_ours(kind, out_features, in_features, b, group, x))
                    candidates.extend(_peers(wanted, out_features, in_features, b, group, x))
            for candidate in candidates:
                try:
                    us = _measure(candidate, x, properties.L2_cache_size)
                    error = candidate.error(x) if candidate.error else math.nan
                except Exception as failure:  # a peer that fails is a result, not the end of the run
                    if candidate.name.startswith(("lutra", "cublas")):
                        raise
                    logger.warning("%s failed on %dx%d batch %d: %s", candidate.name,
                                   out_features, in_features, batch, failure)
                    continue
                if candidate.name == "cublas":
                    dense = us
                rows.append({
                    "implementation": candidate.name,
                    "shape": f"{out_features}x{in_features}",
                    "batch": batch,
                    "bits": candidate.bits,
                    "group": candidate.group,
                    "us": round(us, 3),
                    "gbps": round(candidate.bytes / us / 1e3, 1),
                    "speedup_vs_dense": round(dense / us, 3) if dense else None,
                    "relative_error": None if math.isnan(error) else error,
                })
    return {"read_limit_gbps": round(limit, 1), "machine": _machine(device), "rows": rows}


def _machine(device: torch.device) -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("cuda-bindings", "nvidia-cuda-nvrtc", "triton", "humming-kernels", "gemlite",
                    "fbgemm-gpu-genai", "bitsandbytes"):
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


def _measure(candidate: Candidate, x: Tensor, l2_bytes: int) -> float:
    """Microseconds per call over distinct weights, median over replays of one CUDA graph."""
    copies = max(1, min(MAX_CALLS, -(-CACHE_MULTIPLE * l2_bytes // candidate.bytes) + 1))
    calls = [candidate.make() for _ in range(copies)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], calls[-1]):
            call(x)
    torch.cuda.current_stream().wait_stream(stream)
    # Few calls leave the launch of the graph itself in the time: repeat the rotation.
    rounds = max(1, 8 // copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call(x)
    times = [_timed(graph.replay, x.device) for _ in range(WARM_REPLAYS + REPLAYS)]
    return statistics.median(times[WARM_REPLAYS:]) / (copies * rounds)


def _relative_error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def _dense(out_features: int, in_features: int, x: Tensor) -> Candidate:
    def weight() -> Tensor:
        return torch.randn(out_features, in_features, device=x.device, dtype=x.dtype)

    def make() -> Callable[[Tensor], Tensor]:
        w = weight()
        return lambda x: torch.nn.functional.linear(x, w)

    def error(x: Tensor) -> float:
        w = weight()[:4096]
        return _relative_error(torch.nn.functional.linear(x, w), x.double() @ w.double().T)

    return Candidate("cublas", 16, 0, 2 * out_features * in_features, make, error)


def _ours(
    kind: str, out_features: int, in_features: int, bits: int, group: int, x: Tensor
) -> Candidate:
    from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row
    from lutra.kernels.dispatch import LinearSpec, choose

    group_size = in_features if group <= 0 else group
    uniform = kind == "ubcq" and bits > 1
    spec = LinearSpec(out_features, in_features, bits, group_size, uniform, x.device, x.dtype)
    kernel = choose(spec).kernel
    groups = groups_per_row(in_features, group_size)

    def random_weight(rows: int) -> BitPlanes:
        words = words_per_row(in_features)
        limits = torch.iinfo(torch.int32)
        planes = torch.randint(
            limits.min, limits.max, (bits, rows, words), dtype=torch.int32, device=x.device
        )
        scales = 1 if uniform else bits
        scale = torch.rand(scales, rows, groups, device=x.device) * 0.02 + 0.01
        if not uniform:
            scale = scale * 0.5 ** torch.arange(bits, device=x.device)[:, None, None]
        offset = torch.randn(rows, groups, device=x.device) * 0.005
        return BitPlanes(planes, scale.half(), offset.half(), in_features, group_size)

    def make() -> Callable[[Tensor], Tensor]:
        prepared = kernel.prepare(random_weight(out_features), spec)
        return lambda x: kernel.linear(x, prepared, None, spec)

    def error(x: Tensor) -> float:
        weight = random_weight(out_features)
        y = kernel.linear(x, kernel.prepare(weight, spec), None, spec)
        rows = slice(0, 4096)
        part = BitPlanes(weight.planes[:, rows], weight.scale[:, rows], weight.offset[rows],
                         in_features, group_size)
        return _relative_error(y[:, rows], x.double() @ part.unpack(torch.float64).T)

    stored = random_weight(16).tensors().values()
    size = sum(t.numel() * t.element_size() for t in stored) * out_features // 16
    return Candidate(f"lutra-{kind}", bits, group, size, make, error)


def _peers(
    wanted: list[str] | None, out_features: int, in_features: int, bits: int, group: int, x: Tensor
) -> list[Candidate]:
    from lutra.bench.peers_cuda import PEERS

    found = []
    for name, build in PEERS.items():
        if wanted is None or name in wanted:
            candidate = build(out_features, in_features, bits, group, x)
            if candidate is not None:
                found.append(candidate)
    return found
