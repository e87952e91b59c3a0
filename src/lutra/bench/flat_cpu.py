"""Time of one flattened layer on the CPU beside torch's bfloat16 and 8-bit peers.

The protocol is that of :mod:`lutra.bench.cpu`: everybody takes turns, every call takes the next
copy of the weight, all of a call counts. Ours are whole layers: quantizing and flattening the
activations, the integer product, scales and the output's dtype.

Layers are random integers at the ends of their ranges. 2 % of the channels are twice as wide as the
rest and four of them a hundred times, which with 8 bits are columns of their own (``growth``); with
4 bits a wide channel still fits an 8-bit multiplier.

Peers multiply in 8 bits, with one step for each tensor or token of activations that they find at
run time: ONNX Runtime's ``DynamicQuantizeMatMul``, to which its own dynamic quantization leads, and
torch's ``quantized::linear_dynamic``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutra.bench.cpu import (
    CHECKED_ROWS,
    ROTATED_BYTES,
    Candidate,
    Stream,
    machine,
    onnx_products,
    relative_error,
    time_candidates,
)
from lutra.errors import KernelError
from lutra.formats.flat import FlatWeight, largest_digit

logger = logging.getLogger(__name__)

WIDE_SHARE, VERY_WIDE = 0.02, 4
# From so many rows on, for each shape: matrix units on a shared machine change their speed within
# seconds.
LONG_SECONDS, LONG_FROM = 45.0, 128


def run(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    bits: Sequence[int],
    threads: int = 1,
    peers: str | Sequence[str] = "all",
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure; see the module's docstring.

    Args:
        shapes: ``(out_features, in_features)``.
        batches: rows of activations.
        bits: of our weights, 4 or 8.
        threads: CPU threads.
        peers: ``all``, ``none`` or names of other implementations.
        seconds: for each shape and batch; None takes more for large batches.

    Raises:
        KernelError: the CPU kernels were not built, bits that no layer has, or a peer that does not
            exist.
    """
    from lutra.kernels.cpu import flat_kernels

    if not flat_kernels():
        raise KernelError(
            "the CPU kernels were not built; install a C++ compiler and reinstall lutra"
        )
    if any(b not in (4, 8) for b in bits):
        raise KernelError(f"flattened layers have 4 or 8 bits, not {', '.join(map(str, bits))}")
    makers = _chosen_peers(peers)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = Stream(threads)
        rows = []
        for shape in shapes:
            for batch in batches:
                rows += _one_shape(shape, batch, bits, threads, makers, memory, seconds)
        return {
            "read_limit_gbps": round(memory.gbps(), 2),
            "machine": {**machine(threads), **_level()},
            "rows": rows,
        }
    finally:
        torch.set_num_threads(before)


def _level() -> dict[str, str]:
    from lutra.kernels.cpu.flat import native

    return {"level": native().flat_level()}


def _one_shape(
    shape: tuple[int, int],
    batch: int,
    bits: Sequence[int],
    threads: int,
    makers: list[Callable[..., Iterator[Candidate]]],
    memory: Stream,
    seconds: float | None,
) -> list[dict[str, Any]]:
    out_features, in_features = shape
    x_MI = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(0))
    copies = max(3, math.ceil(ROTATED_BYTES / (out_features * in_features * 6.5)))
    candidates = [_dense(shape, x_MI, copies)]
    for b in bits:
        candidates += _ours(shape, x_MI, b, copies)
    for maker in makers:
        try:
            candidates += maker(shape, x_MI, threads, copies)
        except Exception as error:  # a peer that fails must not lose the others' rows
            logger.warning(
                "%s does not run %dx%d: %s: %s", maker.__name__.strip("_"), out_features,
                in_features, type(error).__name__, error,
            )  # fmt: skip
    if seconds is None and batch >= LONG_FROM:
        seconds = LONG_SECONDS
    timed = time_candidates(candidates, threads, memory, seconds)
    rows = []
    for candidate, (median, best, limit) in zip(candidates, timed, strict=True):
        gbps = candidate.bytes / median / 1e9
        rows.append({
            "implementation": candidate.name, "shape": f"{out_features}x{in_features}",
            "batch": batch, "bits": candidate.bits, "group": 0,
            "us": round(median * 1e6, 1), "us_best": round(best * 1e6, 1), "gbps": round(gbps, 2),
            "fraction_of_read_limit": round(gbps / limit, 3),
            "speedup_vs_dense": round(timed[0][0] / median, 3),
            "speedup_vs_dense_best": round(timed[0][1] / best, 3),
            "relative_error": candidate.error,
        })  # fmt: skip
        logger.info("%s", rows[-1])
    return rows


def _dense(shape: tuple[int, int], x_MI: Tensor, copies: int) -> Candidate:
    weights = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(copies)]
    x = x_MI.bfloat16()
    linear = torch.nn.functional.linear
    y = linear(x[:CHECKED_ROWS], weights[0])
    error = relative_error(y, x[:CHECKED_ROWS], weights[0][:CHECKED_ROWS])
    calls = [partial(linear, x, w) for w in weights]
    return Candidate("torch", 16, 0, 2 * weights[0].numel(), calls, error=error)


def random_layer(shape: tuple[int, int], bits: int, seed: int = 0) -> FlatWeight:
    """Random digits and limits as the module's docstring describes them."""
    out_features, in_features = shape
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(
        -(2**31), 2**31, (1, out_features, in_features * bits // 32), generator=rng
    ).to(torch.int32)
    # The most negative digit is not used: -128 becomes -127 and -8 becomes -7.
    lowest = words.view(torch.int8)
    if bits == 8:
        lowest += lowest == -128
    else:
        lowest += ((lowest & 15) == 8).to(torch.int8) + 16 * ((lowest & -16) == -128)
    limit = torch.full((in_features,), largest_digit(bits))
    wide = torch.randperm(in_features, generator=rng)[: int(WIDE_SHARE * in_features)]
    limit[wide] *= 2
    limit[wide[:VERY_WIDE]] *= 50
    scale = torch.rand(out_features, generator=rng) * 0.01 + 0.001
    return FlatWeight(
        words, scale, limit.to(torch.int32), torch.zeros(0, dtype=torch.int32), bits, in_features
    )


def _ours(shape: tuple[int, int], x_MI: Tensor, bits: int, copies: int) -> Iterator[Candidate]:
    from lutra.kernels.cpu.flat import CpuFlatKernel
    from lutra.kernels.flat import FlatSpec

    out_features, in_features = shape
    if in_features * bits % 32:
        return
    weight = random_layer(shape, bits)
    x_MI = x_MI * (weight.limit / largest_digit(bits))  # activations that need the wide channels
    checked = weight.unpack(torch.float32)[:CHECKED_ROWS]
    kernel = CpuFlatKernel()
    prepared = None
    for suffix, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
        spec = FlatSpec(
            out_features, in_features, in_features, bits, False, False, torch.device("cpu"), dtype
        )
        prepared = prepared or [kernel.prepare(weight, spec) for _ in range(copies)]
        x = x_MI.to(dtype)
        error = relative_error(
            kernel.linear(x, prepared[0], None, spec)[:CHECKED_ROWS], x[:CHECKED_ROWS], checked
        )
        stored = sum(t.numel() * t.element_size() for t in prepared[0])
        calls = [partial(kernel.linear, x, p, None, spec) for p in prepared]
        yield Candidate(f"lutra-flat{bits}{suffix}", bits, 0, stored, calls, error=error)


def _onnxruntime(
    shape: tuple[int, int], x_MI: Tensor, threads: int, copies: int
) -> Iterator[Candidate]:
    import numpy as np

    helper = importlib.import_module("onnx.helper")
    proto = importlib.import_module("onnx").TensorProto
    out_features, in_features = shape
    rng = np.random.default_rng(0)
    x = x_MI.numpy()
    weight = rng.integers(-127, 128, (in_features, out_features), dtype=np.int8)
    scale = (rng.random(out_features, dtype=np.float32) * 0.01 + 0.001).astype(np.float32)
    count = max(1, min(copies, int(1.9e9 // weight.nbytes)))  # a model file ends at 2 GB
    constants, nodes = [], []
    for i in range(count):
        constants += [
            proto(
                name=f"B{i}", data_type=proto.INT8, dims=weight.shape,
                raw_data=np.roll(weight, i, 1).tobytes(),
            ),
            proto(
                name=f"S{i}", data_type=proto.FLOAT, dims=scale.shape,
                raw_data=np.roll(scale, i).tobytes(),
            ),
        ]  # fmt: skip
        nodes.append(
            helper.make_node(
                "DynamicQuantizeMatMul", ["X", f"B{i}", f"S{i}"], [f"Y{i}"], domain="com.microsoft"
            )
        )
    run, results = onnx_products(x, nodes, constants, out_features, threads)
    constants.clear()
    dense = torch.from_numpy(weight.astype(np.float32) * scale).T
    error = relative_error(
        torch.from_numpy(results[0][:CHECKED_ROWS]), x_MI[:CHECKED_ROWS], dense[:CHECKED_ROWS]
    )
    yield Candidate(
        "onnxruntime", 8, 0, weight.nbytes + scale.nbytes,
        [run], products=count, error=error, holds=(results, x),
    )  # fmt: skip


def _torch_int8(
    shape: tuple[int, int], x_MI: Tensor, threads: int, copies: int
) -> Iterator[Candidate]:
    out_features, in_features = shape
    torch.backends.quantized.engine = "x86"
    weight = torch.randint(-127, 128, shape).to(torch.float32) * 0.01
    packed = []
    for _ in range(copies):
        quantized = torch.quantize_per_tensor(weight, 0.01, 0, torch.qint8)
        packed.append(torch.ops.quantized.linear_prepack(quantized, None))
    op = torch.ops.quantized.linear_dynamic
    error = relative_error(
        op(x_MI, packed[0])[:CHECKED_ROWS], x_MI[:CHECKED_ROWS], weight[:CHECKED_ROWS]
    )
    yield Candidate(
        "torch-int8", 8, 0, weight.numel(), [partial(op, x_MI, p) for p in packed], error=error
    )


# Name of the peer, the module that must be importable, its candidates.
PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Iterator[Candidate]]]] = {
    "onnxruntime": (("onnxruntime", "onnx"), _onnxruntime),
    "torch-int8": (("torch",), _torch_int8),
}


def _chosen_peers(peers: str | Sequence[str]) -> list[Callable[..., Iterator[Candidate]]]:
    names = peers.split(",") if isinstance(peers, str) else list(peers)
    names = [n.strip() for n in names if n.strip() and n.strip() != "none"]
    chosen = []
    for name, (modules, maker) in PEERS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if name in names and missing:
            raise KernelError(f"peer {name} needs {', '.join(missing)}, which is not installed")
        if not missing and (name in names or "all" in names):
            chosen.append(maker)
    unknown = [n for n in names if n != "all" and n not in PEERS]
    if unknown:
        raise KernelError(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}, all, none")
    return chosen
