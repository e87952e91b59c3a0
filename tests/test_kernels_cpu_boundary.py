"""The CPU op from outside: wrong arguments, odd strides, threads, processes, gradients."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_kernels_cpu import EXACT, random_weight, relative_error, spec_of

from lutra.errors import KernelError
from lutra.kernels.cpu import linear as cpu
from lutra.kernels.dispatch import LinearSpec, choose
from lutra.nn import QuantizedLinear
from lutra.scheme import Format

_native = pytest.importorskip(
    "lutra.kernels.cpu._native", reason="the CPU extension was not built here"
)


def prepared(out: int = 48, in_: int = 96, bits: int = 2) -> tuple[list[torch.Tensor], LinearSpec]:
    weight = random_weight(out, in_, bits, 32)
    spec = spec_of(weight, torch.float32)
    return cpu.CpuKernel(False).prepare(weight, spec), spec


def call(x: torch.Tensor, tensors: list[torch.Tensor], **changes: object) -> torch.Tensor:
    arguments = {
        "bias": None, "out_features": 48, "in_features": 96, "bits": 2, "group_size": 32,
        "uniform": False, "fast": False, **changes,
    }  # fmt: skip
    return torch.ops.lutra.cpu_linear(x, *tensors, *arguments.values())


def test_wrong_arguments_are_exceptions() -> None:
    tensors, _ = prepared()
    x = torch.randn(2, 96)
    good = call(x, tensors)
    assert good.shape == (2, 48)
    for bad in (
        torch.randn(2, 95), torch.randn(()), x.double(), x.to(torch.int32), x.to(torch.complex64),
        torch.randn(2, 96, device="meta"),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call(bad, tensors)
    for i in range(3):
        for change in (
            lambda t: t[:-1], lambda t: t.double(), lambda t: torch.cat([t, t])[::2],
            lambda t: t.to("meta"), lambda t: t.to(torch.int8),
        ):
            broken = [change(t) if j == i else t for j, t in enumerate(tensors)]
            with pytest.raises((ValueError, RuntimeError)):
                call(x, broken)
    for changes in (
        {"bits": 3}, {"bits": 0}, {"bits": 9}, {"group_size": 0}, {"group_size": 33},
        {"group_size": -1}, {"out_features": 0}, {"out_features": 2**40}, {"uniform": True},
        {"bias": torch.randn(47)}, {"bias": torch.ones(48, dtype=torch.int64)},
    ):
        with pytest.raises((ValueError, RuntimeError)):
            call(x, tensors, **changes)


def test_random_arguments_never_crash() -> None:
    rng = random.Random(0)
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]
    accepted = 0
    for _ in range(2000):
        out, in_, bits, group = (
            rng.choice([-1, 0, 1, 15, 16, 17, 48, 2**33]), rng.choice([0, 1, 31, 32, 33, 96]),
            rng.choice([-2, 0, 1, 2, 8, 9]), rng.choice([-1, 0, 1, 31, 32, 64, 2**40]),
        )  # fmt: skip
        rows = max(out, 0) % 1000 + 15 & ~15
        sizes = [
            rows * (-(-in_ // 32)) * max(bits, 0), rows * max(bits, 0), rows,
        ] if rng.random() < 0.7 else [rng.randrange(500) for _ in range(3)]  # fmt: skip
        tensors = [
            torch.zeros(n, dtype=torch.int32 if i == 0 else rng.choice(dtypes[:4]))
            for i, n in enumerate(sizes)
        ]
        shape = [rng.choice([0, 1, 3]) for _ in range(rng.randrange(3))]
        x = torch.zeros([*shape, rng.choice([in_, in_, 7])], dtype=rng.choice(dtypes))
        bias = rng.choice([None, torch.zeros(max(out, 0) % 1000)])
        try:
            y = call(
                x, tensors, bias=bias, out_features=out, in_features=in_, bits=bits,
                group_size=group, uniform=rng.random() < 0.3, fast=rng.random() < 0.5,
            )
        except (ValueError, RuntimeError):
            continue
        accepted += 1
        assert y.shape == (*x.shape[:-1], out) and not y.any()
    assert accepted > 5


def test_extension_refuses_what_it_cannot_run() -> None:
    layer = (0, 0, 0, 0, 0, 16, 32, 1, 32, False)
    for wrong in (
        lambda: _native.linear(*layer, False, 0, 3, 32, 1, 0, 0, 1),
        lambda: _native.linear(*layer, False, 0, 0, 32, -1, 0, 0, 1),
        lambda: _native.linear(*layer, False, 0, 0, 32, 1, 0, 0, 0),
        lambda: _native.decode(*layer, 5, 3, 0, 0, 1),
        lambda: _native.decode(*layer, 0, 1000, 0, 0, 1),
        lambda: _native.linear(*layer[:7], 9, 32, False, False, 0, 0, 32, 1, 0, 0, 1),
        lambda: _native.set_level("avx1024"),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("rows", [0, 1, 3, 64])
def test_strides_and_alignment(rows: int) -> None:
    weight = random_weight(48, 96, 2, 32)
    spec, kernel = spec_of(weight, torch.float32), cpu.CpuKernel(False)
    tensors = kernel.prepare(weight, spec)
    x = torch.randn(rows, 96)
    y = kernel.linear(x, tensors, None, spec)
    assert y.shape == (rows, 48)
    for other in (
        torch.randn(rows, 200)[:, 3:99].copy_(x),  # rows apart, unaligned
        torch.randn(96, rows).T.copy_(x),  # columns apart
        torch.randn(rows, 192)[:, ::2].copy_(x),
        torch.randn(1 + x.numel())[1:].view(x.shape).copy_(x),
    ):
        assert torch.equal(kernel.linear(other, tensors, None, spec), y)
    if rows == 64:
        deep = x.view(4, 16, 96).transpose(0, 1)
        turned = kernel.linear(deep, tensors, None, spec).transpose(0, 1)
        assert torch.equal(turned.reshape(64, 48), y)


def test_bias() -> None:
    weight = random_weight(70, 96, 2, 32)
    for rows in (1, 128):
        for dtype in (torch.float32, torch.bfloat16):
            spec, kernel = spec_of(weight, dtype), cpu.CpuKernel(False)
            tensors, x = kernel.prepare(weight, spec), torch.randn(rows, 96).to(dtype)
            bias = torch.randn(70).to(dtype) * 10
            with_bias = kernel.linear(x, tensors, bias, spec).float()
            exact = x.float() @ weight.unpack().T + bias.float()
            assert (with_bias - exact).abs().max() < (0.2 if dtype == torch.bfloat16 else 5e-3)


def test_threads_give_the_same_bits() -> None:
    weight = random_weight(500, 512, 3, 128)
    spec, kernel = spec_of(weight, torch.float32), cpu.CpuKernel(False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        tensors = kernel.prepare(weight, spec)
        for rows in (1, 9, 40):
            x = torch.randn(rows, 512)
            torch.set_num_threads(1)
            alone = kernel.linear(x, tensors, None, spec)
            for threads in (2, 8):
                torch.set_num_threads(threads)
                assert torch.equal(kernel.linear(x, tensors, None, spec), alone)
                with ThreadPoolExecutor(8) as callers:
                    together = callers.map(
                        lambda _, x=x: kernel.linear(x, tensors, None, spec), range(40)
                    )
                    assert all(torch.equal(y, alone) for y in together)
    finally:
        torch.set_num_threads(before)


CHILD = """
import hashlib, os, torch
from test_kernels_cpu import random_weight, spec_of
from lutra.kernels.cpu import linear as cpu
torch.set_num_threads(2)
weight = random_weight(300, 256, 2, 64)
x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
spec, kernel = spec_of(weight, torch.float32), cpu.CpuKernel(False)
y = kernel.linear(x, kernel.prepare(weight, spec), None, spec)
child = os.fork()
if child == 0:  # has none of the pool's threads
    again = kernel.linear(x, kernel.prepare(weight, spec), None, spec)
    os._exit(0 if torch.equal(y, again) else 1)
assert os.waitpid(child, 0)[1] == 0, "the forked child differs or died"
digest = hashlib.sha256(y.numpy().tobytes()).hexdigest()
print(cpu.native().level(), digest)
"""

WITHOUT_EXTENSION = """
import logging, sys, torch
sys.modules["lutra.kernels.cpu._native"] = None  # as where no compiler was
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from lutra.nn import QuantizedLinear
from lutra.scheme import Format
torch.manual_seed(0)
for _ in range(3):
    layer = QuantizedLinear(64, 16, Format.parse("bcq2g32"))
    for name, parameter in layer.named_parameters():
        parameter.copy_(torch.ones_like(parameter))
    assert layer.prepare(torch.float32).kernel.name == "reference"
    x = torch.randn(2, 64)
    dense = layer.bitplanes().unpack(torch.float32)
    assert torch.allclose(layer(x), x @ dense.T, atol=1e-4)
"""


def run_child(code: str = CHILD, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root / "src"), str(root / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_and_forced_level() -> None:
    lowest = _native.levels()[-1]
    result = run_child(LUTRA_CPU_ISA=lowest)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == lowest
    refused = run_child(LUTRA_CPU_ISA="mmx")
    assert refused.returncode != 0 and "LUTRA_CPU_ISA=mmx" in refused.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_at_once_give_the_same_bits() -> None:
    with ThreadPoolExecutor(2) as callers:
        both = list(callers.map(lambda _: run_child(), range(2)))
    assert all(result.returncode == 0 for result in both), both[0].stderr + both[1].stderr
    assert both[0].stdout == both[1].stdout


def test_without_the_extension_the_reference_serves_and_says_so_once() -> None:
    result = run_child(WITHOUT_EXTENSION)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("the CPU kernels were not built") == 1
    assert "Install a C++ compiler" in result.stderr


def test_compiles_and_differentiates() -> None:
    weight = random_weight(70, 96, 3, 32)
    layer = QuantizedLinear.from_weight(weight, Format.parse("bcq3g32"))
    x = torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    assert layer.choice is not None and layer.choice.kernel.name == "cpu"
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad @ weight.unpack(), rtol=1e-4, atol=1e-4)
    torch.library.opcheck(
        torch.ops.lutra.cpu_linear.default,
        (x.detach(), *layer._prepared, None, 70, 96, 3, 32, False, False),
    )


def test_dispatch_prefers_exact_and_obeys_force(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(64, 64, 2, 32, False, torch.device("cpu"), torch.float32)
    choose.cache_clear()
    assert choose(spec).kernel.name == "cpu"
    monkeypatch.setenv("LUTRA_KERNEL", "cpu-fast")
    choose.cache_clear()
    assert choose(spec).kernel.name == "cpu-fast"
    choose.cache_clear()
    for change in ({"dtype": torch.float64}, {"bits": 9}, {"group_size": 33}):
        refused = LinearSpec(**{**spec.__dict__, **change})
        assert cpu.CpuKernel(False).supports(refused)


def test_non_finite_activations_reach_the_output() -> None:
    weight = random_weight(32, 64, 2, 32)
    spec, kernel = spec_of(weight, torch.float32), cpu.CpuKernel(False)
    tensors = kernel.prepare(weight, spec)
    for value in (float("nan"), float("inf")):
        x = torch.randn(1, 64)
        x[0, 40] = value
        assert not torch.isfinite(kernel.linear(x, tensors, None, spec)).any()
    zeros = kernel.linear(torch.zeros(1, 64), tensors, None, spec)
    assert torch.equal(zeros, torch.zeros(1, 32))
    tiny = torch.full((1, 64), 1e-30)
    assert relative_error(kernel.linear(tiny, tensors, None, spec), tiny, weight) < EXACT


def test_scales_of_another_dtype_are_refused() -> None:
    weight = random_weight(16, 32, 1, 32)
    weight.scale = weight.scale.double()
    with pytest.raises(KernelError, match="float64"):
        cpu.CpuKernel(False).prepare(weight, spec_of(weight, torch.float32))
