"""Time of one product on the CPU: our kernels beside torch's bfloat16 and every peer installed.

Protocol: each implementation multiplies in turn by as many distinct copies of its weight as fill
600 MB, so that no cache holds them. Between its calls, memory is read in plain streams of 4 MiB:
the limit that its bytes per second are held against was measured under the same conditions.

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
SECONDS = 1.0  # per implementation, shape and batch
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
    """

    name: str
    bits: int
    group: int
    bytes: int
    calls: Sequence[Callable[[], object]]
    products: int = 1
    error: float | None = None


def run(
    shapes: Sequence[tuple[int, int]], batches: Sequence[int], bits: Sequence[int],
    group_sizes: Sequence[int], threads: int = 1, peers: str | Sequence[str] = "all",
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
    shape: tuple[int, int], batch: int, bits: Sequence[int], group_sizes: Sequence[int],
    threads: int, makers: list[Callable[..., Iterator[Candidate]]], memory: Stream,
) -> list[dict[str, Any]]:
    out_features, in_features = shape
    x_MI = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    dense_us = math.nan

    def measure(candidate: Candidate) -> dict[str, Any]:
        median, best, limit = _time(candidate, threads, memory)
        gbps = candidate.bytes / median / 1e9
        row = {
            "implementation": candidate.name, "shape": f"{out_features}x{in_features}",
            "batch": batch, "bits": candidate.bits, "group": candidate.group,
            "us": round(median * 1e6, 1), "us_best": round(best * 1e6, 1), "gbps": round(gbps, 2),
            "fraction_of_read_limit": round(gbps / limit, 3),
            "speedup_vs_dense": None, "relative_error": candidate.error,
        }  # fmt: skip
        rows.append(row)
        logger.info("%s", row)
        return row

    dense_us = measure(_dense(shape, x_MI))["us"]
    for group in group_sizes:
        for b in bits:
            for candidate in _ours(shape, x_MI, b, group):
                measure(candidate)
        for maker in makers:
            try:
                for candidate in maker(shape, x_MI, group, threads):
                    measure(candidate)
            except Exception as error:  # a peer that fails must not lose the others' rows
                logger.warning(
                    "%s does not run %dx%d, group %d: %s: %s", maker.__name__.strip("_"),
                    out_features, in_features, group, type(error).__name__, error,
                )
    for row in rows:
        row["speedup_vs_dense"] = round(dense_us / row["us"], 3)
    return rows


def _time(candidate: Candidate, threads: int, memory: Stream) -> tuple[float, float, float]:
    """Median and best seconds per product, and the read limit in GB/s meanwhile."""
    clock = _clock(threads)
    for call in candidate.calls[:4]:
        call()
    times: list[float] = []
    best = math.inf
    streams: list[float] = []
    start, done = time.perf_counter(), 0
    while (
        time.perf_counter() - start < SECONDS or done < min(len(candidate.calls), 8)
    ) and time.perf_counter() - start < 5 * SECONDS:
        call = candidate.calls[done % len(candidate.calls)]
        wall, used = time.perf_counter(), clock()
        call()
        used, wall = clock() - used, time.perf_counter() - wall
        times.append(used / candidate.products)
        best = min(best, wall / candidate.products)
        done += 1
        # About as much time for reading as for multiplying, but not more often than every tenth.
        if sum(streams) < 0.3 * sum(times) * candidate.products or done % 10 == 0:
            streams.append(memory.read())
    return statistics.median(times), best, STREAM_BYTES / statistics.median(streams) / 1e9


def _copies(bytes: int) -> int:
    return max(3, math.ceil(ROTATED_BYTES / bytes))


def relative_error(y_MO: Tensor, x_MI: Tensor, weight_OI: Tensor) -> float:
    """Norm of the difference to the float64 product of the first rows of the weight."""
    exact = x_MI.double() @ weight_OI.double().T
    return float((y_MO[:, : len(weight_OI)].double() - exact).norm() / exact.norm())


def _dense(shape: tuple[int, int], x_MI: Tensor) -> Candidate:
    copies = _copies(2 * shape[0] * shape[1])
    weights = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(copies)]
    x = x_MI.bfloat16()
    linear = torch.nn.functional.linear
    error = relative_error(linear(x, weights[0]), x, weights[0][:CHECKED_ROWS])
    calls = [partial(linear, x, w) for w in weights]
    return Candidate("torch", 16, 0, 2 * weights[0].numel(), calls, error=error)


def _ours(
    shape: tuple[int, int], x_MI: Tensor, bits: int, group: int
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
        words[:, :CHECKED_ROWS].contiguous(), weight.scale[:, :CHECKED_ROWS].contiguous(),
        weight.offset[:CHECKED_ROWS].contiguous(), in_features, group,
    ).unpack(torch.float64)
    stored = sum(t.numel() * t.element_size() for t in weight.tensors().values())
    kernel = CpuKernel(fast=False)
    spec = LinearSpec(
        out_features, in_features, bits, group, weight.uniform, torch.device("cpu"), torch.float32
    )
    prepared = [kernel.prepare(weight, spec) for _ in range(_copies(stored))]
    for name, fast, dtype in (
        ("lutra", False, torch.float32),
        ("lutra-bf16", False, torch.bfloat16),
        ("lutra-fast", True, torch.float32),
    ):
        kernel, x = CpuKernel(fast), x_MI.to(dtype)
        error = relative_error(kernel.linear(x, prepared[0], None, spec), x, checked)
        calls = [partial(kernel.linear, x, p, None, spec) for p in prepared]
        yield Candidate(name, bits, group, stored, calls, error=error)


def _torch_int4pack(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int
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
    copies = [(packed.clone(), both.clone()) for _ in range(_copies(stored))]
    dense = (codes[:CHECKED_ROWS] - 8).double() * (
        scale.T[:CHECKED_ROWS].double().repeat_interleave(group, 1)
    )
    error = relative_error(op(x, packed, group, both), x, dense)
    yield Candidate(
        "torch-int4pack", 4, group, stored,
        [partial(op, x, p, group, s) for p, s in copies], error=error,
    )


def _onnxruntime(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int
) -> Iterator[Candidate]:
    import numpy as np
    onnx, ort = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    proto, helper = onnx.TensorProto, importlib.import_module("onnx.helper")
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
        count = min(_copies(stored), int(1.9e9 // stored))  # a model file ends at 2 GB
        nodes, constants, outputs = [], [], []
        for i in range(count):
            constants += [
                proto(
                    name=f"B{i}", data_type=proto.UINT8, dims=packed.shape,
                    raw_data=np.roll(packed, i, 0).tobytes(),
                ),
                proto(
                    name=f"S{i}", data_type=proto.FLOAT, dims=scale.shape,
                    raw_data=scale.tobytes(),
                ),
            ]
            # accuracy_level 4: int8 activations, its fast path; level 0 is a hundred times slower.
            nodes.append(
                helper.make_node(
                    "MatMulNBits", ["X", f"B{i}", f"S{i}"], [f"Y{i}"], domain="com.microsoft",
                    K=in_features, N=out_features, bits=bits, block_size=group, accuracy_level=4,
                )
            )
            outputs.append(
                helper.make_tensor_value_info(f"Y{i}", proto.FLOAT, ["M", out_features])
            )
        graph = helper.make_graph(
            nodes, "products",
            [helper.make_tensor_value_info("X", proto.FLOAT, ["M", in_features])],
            outputs, constants,
        )
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains)
        model.ir_version = 10
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        del model, graph, constants
        binding = session.io_binding()
        binding.bind_cpu_input("X", x)
        results = [np.empty((len(x), out_features), np.float32) for _ in range(count)]
        for i, y in enumerate(results):
            binding.bind_output(f"Y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        session.run_with_iobinding(binding)
        fields = np.stack(
            [packed[:CHECKED_ROWS] >> (bits * k) & (2**bits - 1) for k in range(8 // bits)], -1
        )
        codes = fields.reshape(len(fields), in_features).astype(np.float64) - 2 ** (bits - 1)
        steps = np.repeat(scale.reshape(out_features, blocks)[:CHECKED_ROWS], group, 1)
        error = relative_error(torch.from_numpy(results[0]), x_MI, torch.from_numpy(codes * steps))
        yield Candidate(
            "onnxruntime", bits, group, stored,
            [partial(session.run_with_iobinding, binding)], products=count,
            error=error,
        )


def _openvino(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int
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
        for i in range(_copies(stored)):
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
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        }
        compiled = ov.Core().compile_model(ov.Model(results, [x], "products"), "CPU", config)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(x_MI.numpy()))
        yield Candidate(
            "openvino", bits, group, stored,
            [partial(request.infer, share_outputs=True)],
            products=len(results),
        )


def _auto_round_lib(
    shape: tuple[int, int], x_MI: Tensor, group: int, threads: int
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
        copies = [packed.clone() for _ in range(_copies(stored))]

        def multiply(p: Tensor, kind: str = kind) -> Tensor:
            return ark.woqgemm(
                x_MI, p, empty, out_features, in_features, group, "int8", kind, "fp32", False
            )

        dense = codes.T[:CHECKED_ROWS].double() * (
            scale.T[:CHECKED_ROWS].double().repeat_interleave(group, 1)
        )
        yield Candidate(
            "auto-round-lib", bits, group, stored, [partial(multiply, p) for p in copies],
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
