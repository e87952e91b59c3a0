"""Time of flattened layers on the GPU: the product alone and the whole layer, beside 16 bits.

Protocol: every implementation is captured in a CUDA graph that multiplies distinct weights one
after the other, together larger than twice the L2 cache (one where a single weight is that large).
All implementations of a shape and a number of tokens take turns, some milliseconds each, so that
the clock that the card can hold at its power limit is the same for all; the median of the turns is
reported. The order is drawn anew for every turn: who comes behind a kernel that waits for memory
finds a cooler card. Before that the card works for a while.

- ``cublas``: ``x @ W^T`` in bfloat16.
- ``_int_mm``: torch's 8-bit product, int32 out, no scales; more than 16 tokens.
- ``lutra-product``: our integer product with scales and bias, activations already integers.
- ``lutra-quantize``: activations to integers, flattening included.
- ``lutra-layer``: both, which is what a model runs.

Layers are random integers at the ends of their ranges. 2 % of the channels are twice as wide as the
rest and four of them a hundred times, as in :mod:`lutra.bench.flat_cpu`; what that costs in columns
is in ``growth``. Some tokens of every product are compared with the exact one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.formats.flat import FlatWeight, largest_digit

WIDE_SHARE, VERY_WIDE = 0.02, 4
TURNS, TURN_SECONDS, WARM_SECONDS = 15, 0.012, 0.25
CHECKED_TOKENS, CHECKED_ROWS = 32, 512


@dataclass
class _Timed:
    name: str
    bits: int
    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], object]]  # they keep the tensors that the graph reads
    extra: dict[str, Any]


def run(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    bits: Sequence[int] = (8, 4),
    peers: bool | Sequence[str] = True,
) -> dict[str, Any]:
    """Measure; see the module's docstring.

    Args:
        shapes: ``(out_features, in_features)``.
        batches: numbers of tokens.
        bits: of the weights, 4 or 8.
        peers: all, none, or those named, beside cuBLAS, which is always there.

    Returns:
        ``machine`` and ``rows``: ``implementation, shape, batch, bits, us, tops`` (two operations
        for each weight and token, growth not counted), ``speedup_vs_dense``, and for ours ``kernel,
        growth, exact``.

    Raises:
        KernelError: there is no CUDA device, the kernels cannot run on it, bits that no layer has,
            or a wrong result.
    """
    from lutra.bench.cuda import _machine

    if not torch.cuda.is_available():
        raise KernelError("no CUDA device: run this where there is one, or pass --device cpu")
    if any(b not in (4, 8) for b in bits):
        raise KernelError(f"flattened layers have 4 or 8 bits, not {', '.join(map(str, bits))}")
    device = torch.device("cuda", torch.cuda.current_device())
    with_int_mm = peers is True or (peers is not False and "_int_mm" in peers)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        dense = _dense_weights(shape, device)
        layers = {b: _layers(shape, b, device) for b in bits}
        for batch in batches:
            rows += _measure(shape, batch, dense, layers, with_int_mm, device)
        del dense, layers
        torch.cuda.empty_cache()
    return {"machine": _machine(device), "rows": rows}


def random_layer(
    out_features: int, in_features: int, bits: int, device: torch.device, seed: int = 0
) -> FlatWeight:
    """A layer with wide channels; see the module's docstring."""
    generator = torch.Generator(device).manual_seed(seed)
    most = largest_digit(bits)
    limit = torch.full((in_features,), most, dtype=torch.int32, device=device)
    order = torch.randperm(in_features, generator=generator, device=device)
    wide = round(WIDE_SHARE * in_features)
    limit[order[:wide]] *= 2
    limit[order[wide : wide + VERY_WIDE]] *= 100
    words = -(-in_features * bits // 32)
    digits = torch.randint(
        -(2**31), 2**31, (1, out_features, words), generator=generator, device=device,
        dtype=torch.int64,
    ).to(torch.int32)  # fmt: skip
    scale = torch.rand(out_features, generator=generator, device=device) * 1e-4 + 1e-5
    none = torch.empty(0, dtype=torch.int32, device=device)
    return FlatWeight(digits, scale, limit, none, bits, in_features)


def random_input(tokens: int, layer: FlatWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal activations, as wide in each channel as the layer expects."""
    x = torch.randn(tokens, layer.in_features, device=layer.scale.device)
    return (x * (layer.limit / largest_digit(layer.bits))).to(dtype)


def _copies(bytes_of_one: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(32, -(-2 * cache // bytes_of_one)))


def _dense_weights(shape: tuple[int, int], device: torch.device) -> list[Tensor]:
    count = _copies(2 * shape[0] * shape[1], device)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(count)]


@dataclass
class _Layer:
    weight: FlatWeight
    prepared: Any
    spec: Any


def _layers(shape: tuple[int, int], bits: int, device: torch.device) -> list[_Layer]:
    from lutra.kernels.cuda.flat import CudaFlatKernel
    from lutra.kernels.cuda.flat_layout import Prepared
    from lutra.kernels.flat import FlatSpec

    kernel, made = CudaFlatKernel(), []
    for seed in range(_copies(shape[0] * shape[1] * bits // 8, device)):
        weight = random_layer(*shape, bits, device, seed)
        spec = FlatSpec(*shape, weight.columns, bits, False, False, device, torch.bfloat16)
        refusal = kernel.supports(spec)
        if refusal:
            raise KernelError(f"the flat kernels cannot be measured here: {refusal}")
        made.append(_Layer(weight, Prepared(*kernel.prepare(weight, spec)), spec))
    return made


def _measure(
    shape: tuple[int, int],
    batch: int,
    dense: list[Tensor],
    layers: dict[int, list[_Layer]],
    with_int_mm: bool,
    device: torch.device,
) -> list[dict[str, Any]]:
    out_features, in_features = shape
    x = torch.randn(batch, in_features, device=device, dtype=torch.bfloat16)
    timed = [_captured("cublas", 16, [_product(x, w) for w in dense], {})]
    if with_int_mm and batch > 16 and 8 in layers:
        q = torch.randint(-127, 128, (batch, in_features), dtype=torch.int8, device=device)
        eights = [layer.prepared.weight[:out_features] for layer in layers[8]]
        eights = [w[:, :in_features].contiguous() for w in eights]
        calls = [lambda w=w: torch._int_mm(q, w.T) for w in eights]
        timed.append(_captured("_int_mm", 8, calls, {}))
    for bits, ours in layers.items():
        timed += _ours(batch, bits, ours)
    times = _take_turns(timed)
    rows = []
    for candidate, us in zip(timed, times, strict=True):
        rows.append({
            "implementation": candidate.name, "shape": f"{out_features}x{in_features}",
            "batch": batch, "bits": candidate.bits, "us": round(us, 2),
            "tops": round(2 * batch * out_features * in_features / us / 1e6, 1),
            "speedup_vs_dense": round(times[0] / us, 3), **candidate.extra,
        })  # fmt: skip
    return rows


def _product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    y = x.new_empty(len(x), len(weight))
    return lambda: torch.mm(x, weight.T, out=y)


def _ours(batch: int, bits: int, layers: list[_Layer]) -> list[_Timed]:
    from lutra.kernels.cuda import flat_products as products
    from lutra.kernels.cuda.launch import card

    first = layers[0]
    rows = first.weight.out_features
    x = random_input(batch, first.weight)
    q, step = products.quantize(x, first.prepared)
    job = products.job_of(first.prepared, rows, batch, x.dtype)
    plan, _ = products.choose(job, card(x.device.index))
    y = x.new_empty(batch, rows)

    def product(layer: _Layer) -> Callable[[], object]:
        return lambda: products.run(plan, job, q, step, layer.prepared, None, y)

    def quantize(layer: _Layer) -> Callable[[], object]:
        return lambda: products.quantize(x, layer.prepared)

    def whole(layer: _Layer) -> Callable[[], object]:
        return lambda: products.linear(x, layer.prepared, None, rows)

    _check(products.linear(x, first.prepared, None, rows), x, first)
    extra = {
        "kernel": plan.kernel, "plan": {k: v for k, v in vars(plan).items() if k != "kernel"},
        "growth": round(first.prepared.columns / first.weight.in_features - 1, 4), "exact": True,
    }  # fmt: skip
    return [
        _captured("lutra-product", bits, [product(layer) for layer in layers], extra),
        _captured("lutra-quantize", bits, [quantize(layer) for layer in layers], {}),
        _captured("lutra-layer", bits, [whole(layer) for layer in layers], extra),
    ]


def _check(y: Tensor, x: Tensor, layer: _Layer) -> None:
    """Some tokens and features, against the exact product, bit for bit."""
    from lutra.kernels.cuda.flat_layout import some_rows
    from lutra.kernels.flat.reference import linear

    tokens = torch.randperm(len(x), device=x.device)[:CHECKED_TOKENS]
    begin = max(0, layer.weight.out_features - CHECKED_ROWS)
    rows = some_rows(layer.weight, begin, layer.weight.out_features)
    expected = linear(x[tokens], rows, None)
    if not torch.equal(y[tokens, begin:], expected):
        raise KernelError("a flat CUDA kernel gave a result that is not the exact product")


def _captured(
    name: str, bits: int, calls: Sequence[Callable[[], object]], extra: dict[str, Any]
) -> _Timed:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return _Timed(name, bits, graph, calls, extra)


def _replay_us(candidate: _Timed, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        candidate.graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / replays / len(candidate.calls)


def _take_turns(timed: list[_Timed]) -> list[float]:
    """Median microseconds of a call of each candidate."""
    replays = [max(1, round(TURN_SECONDS * 1e6 / (_replay_us(c, 1) * len(c.calls)))) for c in timed]
    until = time.monotonic() + WARM_SECONDS
    while time.monotonic() < until:
        for candidate in timed:
            candidate.graph.replay()
        torch.cuda.synchronize()
    order, chooser = list(range(len(timed))), random.Random(0)
    turns: list[list[float]] = [[] for _ in timed]
    for _ in range(TURNS):
        chooser.shuffle(order)
        for i in order:
            turns[i].append(_replay_us(timed[i], replays[i]))
    return [statistics.median(of_one) for of_one in turns]
