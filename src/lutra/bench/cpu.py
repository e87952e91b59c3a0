"""Time of one product on the CPU: our kernels beside torch's bfloat16 and every peer installed.

Protocol: all implementations of one shape and batch take turns, so that neighbours disturb all
alike: an untimed call and four timed ones, as layers of a model follow each other, and a plain read
of 4 MiB of memory. Each call takes the next copy of the weight; between two uses of a copy more
than 600 MB are read, so no cache holds it. The reads give the limit that bytes per second are held
against.

With one thread, ``us`` is the median of the process's CPU time, which a busy machine disturbs less
than the clock; with more it is the median of the clock. ``us_best`` is the fastest call by the
clock. All of a call counts, with its Python, lookup tables and conversions. On a shared machine
compare ratios within one run, never figures of two.

Bytes (``gbps``) are those of the stored tensors: packed weight, scales, offsets.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.formats.bitplanes import BitPlanes, groups_per_row, words_per_row

logger = logging.getLogger(__name__)

ROTATED_BYTES = 600_000_000
STREAM_BYTES = 4 << 20
SECONDS = 12.0  # per shape and batch
MIN_ROUNDS, MAX_ROUNDS = 4, 200
TURN_CALLS = 4
CHECKED_ROWS = 256  # outputs compared in float64


@dataclass
class Candidate:
    """One implementation, ready to be timed.

    Attributes:
        name: ours begin with ``lutra``.
        bits: of the weights; 16 is dense.
        group: inputs per group, 0 for none.
        bytes: stored bytes of one weight.
        calls: each multiplies by its own copy (or copies) of the weight.
        products: products in one call.
        error: relative error of the output against float64, or None where it is not known.
        holds: whatever else must live as long as the calls.
    """

    name: str
    bits: int
    group: int
    bytes: int
    calls: Sequence[Callable[[], object]]
    products: int = 1
    error: float | None = None
    holds: object = None


def run(
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    bits: Sequence[int],
    group_sizes: Sequence[int],
    threads: int = 1,
    peers: str | Sequence[str] = "all",
) -> dict[str, Any]:
    """Measure; see :func:`lutra.bench.kernel.run` and the module's docstring.

    Raises:
        KernelError: the CPU kernels were not built, or a peer does not exist.
    """
    from lutra.kernels.cpu import kernels

    if not kernels():
        raise KernelError(
            "the CPU kernels were not built; install a C++ compiler and reinstall lutra"
        )
    makers = _chosen_peers(peers)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        memory = Stream(threads)
        rows = []
        for shape in shapes:
            for batch in batches:
                rows += _one_shape(shape, batch, bits, group_sizes, threads, makers, memory)
        return {
            "read_limit_gbps": round(memory.gbps(), 2),
            "machine": machine(threads),
            "rows": rows,
        }
    finally:
        torch.set_num_threads(before)


class Stream:
    """Plain reading of memory, in pieces of 4 MiB of 512 MiB."""

    def __init__(self, threads: int) -> None:
        from lutra.kernels.cpu.linear import native

        self._native, self._threads, self._at = native(), threads, 0
        self._data = self._native.allocate(512 << 20)
        self._data.zero_()
        self.seconds: list[float] = []

    def read(self) -> float:
        """Read the next piece; returns the seconds it took, on the clock of :func:`_clock`."""
        clock = _clock(self._threads)
        start = clock()
        self._native.read_stream(self._data.data_ptr() + self._at, STREAM_BYTES, self._threads)
        took = clock() - start
        self._at = (self._at + STREAM_BYTES) % self._data.numel()
        self.seconds.append(took)
        return took

    def gbps(self) -> float:
        return STREAM_BYTES / statistics.median(self.seconds) / 1e9


def _clock(threads: int) -> Callable[[], float]:
    return time.process_time if threads == 1 else time.perf_counter


def _one_shape(
    shape: tuple[int, int],
    batch: int,
    bits: Sequence[int],
    group_sizes: Sequence[int],
    threads: int,
    makers: list[Callable[..., Iterator[Candidate]]],
    memory: Stream,
) -> list[dict[str, Any]]:
    out_features, in_features = shape
    x_MI = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(0))
    copies = _copies(shape, bits, group_sizes)
    candidates = [_dense(shape, x_MI, copies)]
    for group in group_sizes:
        for b in bits:
            candidates += _ours(shape, x_MI, b, group, copies)
        for maker in makers:
            try:
                candidates += maker(shape, x_MI, group, threads, copies)
            except Exception as error:  # a peer that fails must not lose the others' rows
                logger.warning(
                    "%s does not run %dx%d, group %d: %s: %s",
                    maker.__name__.strip("_"),
                    out_features,
                    in_features,
                    group,
                    type(error).__name__,
                    error,
                )
    rows = []
    timed = time_candidates(candidates, threads, memory)
    for candidate, (median, best, limit) in zip(candidates, timed, strict=True):
        gbps = candidate.bytes / median / 1e9
        rows.append({
            "implementation": candidate.name, "shape": f"{out_features}x{in_features}",
            "batch": batch, "bits": candidate.bits, "group": candidate.group,
            "us": round(median * 1e6, 1), "us_best": round(best * 1e6, 1), "gbps": round(gbps, 2),
            "fraction_of_read_limit": round(gbps / limit, 3),
            "speedup_vs_dense": round(timed[0][0] / median, 3),
            "relative_error": candidate.error,
        })  # fmt: skip
        logger.info("%s", rows[-1])
    return rows


def time_candidates(
    candidates: list[Candidate], threads: int, memory: Stream, seconds: float | None = None
) -> list[tuple[float, float, float]]:
    """Per candidate: median and best seconds per product, and the read limit in GB/s meanwhile."""
    seconds = SECONDS if seconds is None else seconds
    clock = _clock(threads)
    used: list[list[float]] = [[] for _ in candidates]
    best = [math.inf] * len(candidates)
    streams: list[list[float]] = [[] for _ in candidates]
    start, round_ = time.perf_counter(), 0
    while round_ < MIN_ROUNDS or (time.perf_counter() - start < seconds and round_ < MAX_ROUNDS):
        for i, candidate in enumerate(candidates):
            first = round_ * TURN_CALLS
            if threads > 1:
                # Thread pools of others spin for a while after a call, and would take cores.
                time.sleep(0.005)
            if candidate.products < TURN_CALLS:
                # Untimed: whoever follows a large product would pay for the caches it emptied.
                candidate.calls[(first - 1) % len(candidate.calls)]()
            for turn in range(first, first + TURN_CALLS // min(candidate.products, TURN_CALLS)):
                call = candidate.calls[turn % len(candidate.calls)]
                wall, cpu = time.perf_counter(), clock()
                call()
                cpu, wall = clock() - cpu, time.perf_counter() - wall
                if round_ > 0:  # the first round warms up
                    used[i].append(cpu / candidate.products)
                    best[i] = min(best[i], wall / candidate.products)
            streams[i].append(memory.read())
        round_ += 1
    return [
        (statistics.median(t), b, STREAM_BYTES / statistics.median(s) / 1e9)
        for t, b, s in zip(used, best, streams, strict=True)
    ]


def _copies(shape: tuple[int, int], bits: Sequence[int], group_sizes: Sequence[int]) -> int:
    """Copies of every weight, so that a round of all implementations times them is enough."""
    weights = shape[0] * shape[1]
    a_round = 2.0 * weights
    for b in bits:
        for group in group_sizes:
            scales = 2 * (b + 1) / (group if group > 0 else shape[1])
            a_round += 3 * weights * (b / 8 + scales)
    return max(3, math.ceil(ROTATED_BYTES / a_round))


def relative_error(y_MO: Tensor, x_MI: Tensor, weight_OI: Tensor) -> float:
    """Norm of the difference to the float64 product of the first rows of the weight."""
    exact = x_MI.double() @ weight_OI.double().T
    return float((y_MO[:, : len(weight_OI)].double() - exact).norm() / exact.norm())


def _dense(shape: tuple[int, int], x_MI: Tensor, copies: int) -> Candidate:
    weights = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(copies)]
    x = x_MI.bfloat16()
    linear = torch.nn.functional.linear
    error = relative_error(linear(x, weights[0]), x, weights[0][:CHECKED_ROWS])
    calls = [partial(linear, x, w) for w in weights]
    return Candidate("torch", 16, 0, 2 * weights[0].numel(), calls, error=error)


def _ours(
    shape: tuple[int, int], x_MI: Tensor, bits: int, group: int, copies: int
) -> Iterator[Candidate]:
    from lutra.kernels.cpu.linear import CpuKernel
    from lutra.kernels.dispatch import LinearSpec

    out_features, in_features = shape
    group = group if group > 0 else words_per_row(in_features) * 32
    groups = groups_per_row(in_features, group)
    rng = torch.Generator().manual_seed(bits)
    words = torch.randint(
        -(2**31), 2**31, (bits, out_features, words_per_row(in_features)), generator=rng
    ).to(torch.int32)
    if in_features % 32:
        words[..., -1] &= (1 << in_features % 32) - 1
    # Every plane has half the scale of the one before, as fitted weights roughly have.
    halving = 0.5 ** torch.arange(bits)[:, None, None]
    scale = (torch.rand((bits, out_features, groups), generator=rng) * 0.5 + 0.5) * halving
    offset = torch.randn((out_features, groups), generator=rng) * 0.05
    weight = BitPlanes(words, scale.half(), offset.half(), in_features, group)
    checked = BitPlanes(
        words[:, :CHECKED_ROWS].contiguous(),
        weight.scale[:, :CHECKED_ROWS].contiguous(),
        weight.offset[:CHECKED_ROWS].contiguous(),
        in_features,
        group,
    ).unpack(torch.float64)
    stored = sum(t.numel() * t.element_size() for t in weight.tensors().values())
    spec = LinearSpec(
        out_features, in_features, bits, group, weight.uniform, torch.device("cpu"), torch.float32
    )
    for name, fast, dtype in (
        ("lutra", False, torch.float32),
        ("lutra-bf16", False, torch.bfloat16),
        ("lutra-fast", True, torch.float32),
    ):
        kernel, x = CpuKernel(fast), x_MI.to(dtype)
        prepared = [kernel.prepare(weight, spec) for _ in range(copies)]
        error = relative_error(kernel.linear(x, prepared[0], None, spec), x, checked)
        calls = [partial(kernel.linear, x, p, None, spec) for p in prepared]
        yield Candidate(name, bits, group, stored, calls, error=error)


def _torch_int4pack(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int, copies: int
) -> Iterator[Candidate]:
    out_features, in_features = shape
    if group not in (32, 64, 128, 256) or in_features % group:
        return
    codes = torch.randint(0, 16, shape, dtype=torch.int32)
    scale = (torch.rand(in_features // group, out_features) * 0.01 + 0.01).bfloat16()
    zeros = torch.zeros_like(scale)  # weight = scale * (code - 8) + zero
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.stack([scale, zeros], -1).contiguous()
    stored = packed.numel() * packed.element_size() + both.numel() * 2
    x = x_MI.bfloat16()
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    weights = [(packed.clone(), both.clone()) for _ in range(copies)]
    dense = (codes[:CHECKED_ROWS] - 8).double() * (
        scale.T[:CHECKED_ROWS].double().repeat_interleave(group, 1)
    )
    error = relative_error(op(x, packed, group, both), x, dense)
    yield Candidate(
        "torch-int4pack",
        4,
        group,
        stored,
        [partial(op, x, p, group, s) for p, s in weights],
        error=error,
    )


def onnx_products(
    x: Any, nodes: list[Any], constants: list[Any], out_features: int, threads: int
) -> tuple[Callable[[], None], list[Any]]:
    """A graph of ONNX Runtime that multiplies ``x`` by one weight after the other.

    Args:
        x: float32 array ``[tokens, in_features]``, input ``X``; to be kept as long as the call.
        nodes: one product each; that of weight ``i`` gives output ``Y{i}``.
        constants: their weights.
        threads: of a product.

    Returns:
        The call, which has run once, and the array ``[tokens, out_features]`` of each output.
    """
    import numpy as np

    onnx, ort = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    proto, helper = onnx.TensorProto, importlib.import_module("onnx.helper")

    def of(name: str, features: int) -> Any:
        return helper.make_tensor_value_info(name, proto.FLOAT, ["M", features])

    outputs = [of(f"Y{i}", out_features) for i in range(len(nodes))]
    graph = helper.make_graph(nodes, "products", [of("X", x.shape[1])], outputs, constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    results = [np.empty((len(x), out_features), np.float32) for _ in nodes]
    for i, y in enumerate(results):
        binding.bind_output(f"Y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    session.run_with_iobinding(binding)
    return partial(session.run_with_iobinding, binding), results


def _onnxruntime(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int, copies: int
) -> Iterator[Candidate]:
    import numpy as np

    helper = importlib.import_module("onnx.helper")
    proto = importlib.import_module("onnx").TensorProto
    out_features, in_features = shape
    if group not in (32, 64, 128, 256) or in_features % group:
        return
    blocks = in_features // group
    rng = np.random.default_rng(0)
    x = x_MI.numpy()
    for bits in (2, 4, 8):
        blob = group * bits // 8
        packed = rng.integers(0, 256, (out_features, blocks, blob), dtype=np.uint8)
        scale = rng.random(out_features * blocks, dtype=np.float32) * 0.01 + 0.01
        stored = packed.nbytes + scale.nbytes
        count = min(copies, int(1.9e9 // stored))  # a model file ends at 2 GB
        constants, nodes = [], []
        for i in range(count):
            constants += [
                proto(
                    name=f"B{i}",
                    data_type=proto.UINT8,
                    dims=packed.shape,
                    raw_data=np.roll(packed, i, 0).tobytes(),
                ),
                proto(
                    name=f"S{i}",
                    data_type=proto.FLOAT,
                    dims=scale.shape,
                    raw_data=scale.tobytes(),
                ),
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    ["X", f"B{i}", f"S{i}"],
                    [f"Y{i}"],
                    domain="com.microsoft",
                    K=in_features,
                    N=out_features,
                    bits=bits,
                    block_size=group,
                    accuracy_level=4,
                )
            )
        run, held = onnx_products(x, nodes, constants, out_features, threads)
        constants.clear()
        fields = np.stack(
            [packed[:CHECKED_ROWS] >> (bits * k) & (2**bits - 1) for k in range(8 // bits)], -1
        )
        codes = fields.reshape(len(fields), in_features).astype(np.float64) - 2 ** (bits - 1)
        steps = np.repeat(scale.reshape(out_features, blocks)[:CHECKED_ROWS], group, 1)
        error = relative_error(torch.from_numpy(held[0]), x_MI, torch.from_numpy(codes * steps))
        yield Candidate(
            "onnxruntime",
            bits,
            group,
            stored,
            [run],
            products=count,
            error=error,
            holds=(x, held),
        )


def _openvino(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int, copies: int
) -> Iterator[Candidate]:
    import numpy as np

    ov = importlib.import_module("openvino")
    op = importlib.import_module("openvino.opset13")
    out_features, in_features = shape
    if group <= 0 or in_features % group:
        return
    rng = np.random.default_rng(0)
    for bits, kind, middle in ((2, ov.Type.u2, 0xAA), (4, ov.Type.u4, 0x88)):
        zeros_bytes = out_features * (in_features // group) * bits // 8
        stored = shape[0] * shape[1] * bits // 8 + zeros_bytes + zeros_bytes * 16 // bits
        x = op.parameter([-1, in_features], np.float32, "X")
        base = rng.integers(0, 256, out_features * in_features * bits // 8, dtype=np.uint8)
        kept, results = [], []
        for i in range(copies):
            data = np.roll(base, 4099 * (i + 1))
            zero = np.full(zeros_bytes, middle, np.uint8)
            kept += [data, zero]
            grouped = [out_features, in_features // group, group]
            w = op.convert(op.constant(ov.Tensor(data, ov.Shape(grouped), kind)), "f16")
            z = op.constant(ov.Tensor(zero, ov.Shape([*grouped[:2], 1]), kind))
            s = (rng.random((*grouped[:2], 1)) * 0.01 + 0.01).astype(np.float16)
            w = op.multiply(op.subtract(w, op.convert(z, "f16")), op.constant(s))
            flat = op.reshape(w, np.array(shape, np.int64), False)
            results.append(op.result(op.matmul(x, op.convert(flat, "f32"), False, True)))
        config = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        }
        compiled = ov.Core().compile_model(ov.Model(results, [x], "products"), "CPU", config)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x_MI.numpy()))
        yield Candidate(
            "openvino",
            bits,
            group,
            stored,
            [partial(request.infer, share_outputs=True)],
            products=len(results),
            holds=kept,
        )


def _auto_round_lib(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int, copies: int
) -> Iterator[Candidate]:
    ark = importlib.import_module("auto_round_kernel")
    out_features, in_features = shape
    if group <= 0 or in_features % group:
        return
    if hasattr(ark, "set_threads"):
        ark.set_threads(threads)
    empty = torch.empty(0)
    for bits in (2, 3, 4, 8):
        kind = f"int{bits}"
        codes = torch.randint(
            -(1 << (bits - 1)), 1 << (bits - 1), (in_features, out_features), dtype=torch.int8
        )
        scale = torch.rand(in_features // group, out_features) * 0.01 + 0.01
        packed = ark.repack_quantized_weight(
            codes, scale, torch.empty(0, dtype=torch.int8), group, "int8", kind, "fp32", False
        )
        stored = packed.numel() * packed.element_size()
        weights = [packed.clone() for _ in range(copies)]

        def multiply(p: Tensor, kind: str = kind) -> Tensor:
            return ark.woqgemm(
                x_MI, p, empty, out_features, in_features, group, "int8", kind, "fp32", False
            )

        dense = codes.T[:CHECKED_ROWS].double() * (
            scale.T[:CHECKED_ROWS].double().repeat_interleave(group, 1)
        )
        yield Candidate(
            "auto-round-lib",
            bits,
            group,
            stored,
            [partial(multiply, p) for p in weights],
            error=relative_error(multiply(packed), x_MI, dense),
        )


# Name of the peer, the module that must be importable, its candidates.
PEERS: dict[str, tuple[tuple[str, ...], Callable[..., Iterator[Candidate]]]] = {
    "torch-int4pack": (("torch",), _torch_int4pack),
    "onnxruntime": (("onnxruntime", "onnx"), _onnxruntime),
    "openvino": (("openvino",), _openvino),
    "auto-round-lib": (("auto_round_kernel",), _auto_round_lib),
}


def _chosen_peers(peers: str | Sequence[str]) -> list[Callable[..., Iterator[Candidate]]]:
    names = peers.split(",") if isinstance(peers, str) else list(peers)
    names = [n.strip() for n in names if n.strip() and n.strip() != "none"]
    everything = "all" in names
    chosen = []
    for name, (modules, maker) in PEERS.items():
        if not everything and name not in names:
            continue
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if not missing:
            chosen.append(maker)
        elif not everything:
            raise KernelError(f"peer {name} needs {', '.join(missing)}, which is not installed")
    unknown = [n for n in names if n != "all" and n not in PEERS]
    if unknown:
        raise KernelError(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}, all, none")
    return chosen


def machine(threads: int) -> dict[str, Any]:
    """What a reader needs to know to repeat the run."""
    from lutra.kernels.cpu.linear import native

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                name,
            )
    except OSError as error:
        logger.info("the processor's name is not known: %s", error)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("lutra", "onnxruntime", "openvino", "auto-round-lib"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": name, "cores": os.cpu_count(), "threads": threads, "level": native().level(),
        "matrix_unit": native().has_matrix_unit(), "versions": versions,
        "clock": "CPU time" if threads == 1 else "wall",
    }  # fmt: skip
