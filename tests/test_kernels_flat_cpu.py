"""The CPU kernel of flattened layers against wide integers, bit for bit, on every level here."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lutra.errors import KernelError
from lutra.formats.flat import FlatWeight
from lutra.kernels.cpu import flat as cpu
from lutra.kernels.dispatch import Choice
from lutra.kernels.flat import FlatSpec, choose, reference
from lutra.kernels.flat.lowering import activation_digits, lower, quantize_input

_native = pytest.importorskip(
    "lutra.kernels.cpu._native", reason="the CPU extension was not built here"
)

LEVELS = _native.flat_levels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.flat_level()
    _native.set_flat_level(request.param)
    yield request.param
    _native.set_flat_level(before)


def random_layer(
    out: int, in_: int, bits: int, seed: int = 0, wide: float = 0.1, largest: int = 40_000,
    static: bool = False, smooth: bool = False,
) -> FlatWeight:
    """Random integers at the ends of their ranges; a share `wide` of channels has more digits."""
    rng = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) - 1
    limit = torch.full((in_,), most)
    chosen = torch.rand(in_, generator=rng) < wide
    # Pieces, 127 and 254 and their neighbours, two digits, two digits of which one has pieces.
    kinds = torch.tensor(
        [2 * most, 3 * most, 127, 128, 254, 255, 2000, 255 * 127 + 127, 255 * 127 + 128, largest]
    )
    kinds = kinds[kinds <= largest]
    limit[chosen] = kinds[torch.randint(len(kinds), (int(chosen.sum()),), generator=rng)]
    weight = torch.randint(-most, most + 1, (out, in_), generator=rng)
    digits = torch.where(torch.rand(in_, generator=rng) < wide, 3, 1)
    return FlatWeight.pack(
        weight * digits, torch.rand(out, generator=rng) * 0.01 + 1e-4, limit, bits,
        torch.rand(1, generator=rng) * 0.02 + 1e-3 if static else None,
        torch.rand(in_, generator=rng) + 0.5 if smooth else None,
    )  # fmt: skip


def random_input(rows: int, weight: FlatWeight, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, weight.in_features, generator=rng)
    usual = weight.limit.min()
    return x * torch.where(weight.limit > usual, (weight.limit / usual) * 0.3, 1.0)


def spec_of(weight: FlatWeight, dtype: torch.dtype = torch.float32) -> FlatSpec:
    return FlatSpec(
        weight.out_features, weight.in_features, weight.columns, weight.bits,
        weight.step is not None, weight.smooth is not None, torch.device("cpu"), dtype,
    )  # fmt: skip


def multiply(
    weight: FlatWeight, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    kernel, spec = cpu.CpuFlatKernel(), spec_of(weight, x.dtype)
    assert kernel.supports(spec) is None
    return kernel.linear(x, kernel.prepare(weight, spec), bias, spec)


def assert_same_bits(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


SHAPES = [(1, 1), (17, 64), (70, 200), (33, 63), (48, 65), (130, 128), (15, 1500)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_grid(level: str, shape: tuple[int, int], bits: int) -> None:
    for seed, rows in enumerate((1, 2, 7, 8, 16, 33)):
        weight = random_layer(*shape, bits, seed, static=seed % 2 == 1, smooth=seed % 3 == 2)
        bias = torch.randn(shape[0]) if seed % 2 else None
        x = random_input(rows, weight, seed).to(DTYPES[seed % 3])
        assert_same_bits(multiply(weight, x, bias), reference.linear(x, weight, bias))


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 80), st.integers(1, 300), st.integers(0, 40), st.sampled_from([4, 8]),
    st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 2**30), st.sampled_from(DTYPES),
)
def test_random_layers(
    out: int, in_: int, rows: int, bits: int, wide: float, static: bool, smooth: bool, seed: int,
    dtype: torch.dtype,
) -> None:
    weight = random_layer(out, in_, bits, seed, wide, static=static, smooth=smooth)
    spec, kernel = spec_of(weight, dtype), cpu.CpuFlatKernel()
    tensors = kernel.prepare(weight, spec)
    assert torch.equal(kernel.restore(tensors, spec), weight.digits)
    x = random_input(rows, weight, seed).to(dtype)
    expected = reference.linear(x, weight, None)
    before = _native.flat_level()
    try:
        for name in LEVELS:
            _native.set_flat_level(name)
            assert_same_bits(kernel.linear(x, tensors, None, spec), expected)
    finally:
        _native.set_flat_level(before)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_and_steps(level: str, bits: int) -> None:
    """Quantizing and flattening alone: every column, its sum and the step, ties included."""
    for seed, in_ in enumerate((1, 64, 127, 500)):
        for static in (False, True):
            weight = random_layer(5, in_, bits, seed, wide=0.3, static=static, smooth=seed == 3)
            x = random_input(40, weight, seed)
            if static and weight.step is not None:  # quotients at and next to halves
                halves = (torch.randint(-300, 300, x.shape) + 0.5) * weight.step
                x = torch.where(torch.rand(x.shape) < 0.5, halves, x)
                up = torch.nextafter(x, torch.tensor(torch.inf))
                x = torch.where(torch.rand(x.shape) < 0.3, up, x)
            lowered = lower(weight, tile=64, merge=False)
            q_MI, step_M = quantize_input(x, weight.limit, weight.step, weight.smooth)
            expected = torch.where(lowered.origin < 0, 0, activation_digits(q_MI, lowered))
            tensors = cpu.prepare(weight)
            columns, sums, steps = cpu.quantized(x, tensors, weight.out_features, bits)
            assert torch.equal(columns, expected)
            assert torch.equal(steps, step_M)
            high = expected[:, : lowered.high].sum(1), expected[:, lowered.high :].sum(1)
            assert torch.equal(sums.long(), 255 * high[0] + high[1])


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-20, 1e20, 1e30, 3e36])
def test_extreme_activations(level: str, scale: float) -> None:
    for static in (False, True):
        weight = random_layer(20, 90, 8, static=static)
        x = random_input(4, weight, 1)
        x = x / x.abs().max() * scale
        assert_same_bits(multiply(weight, x), reference.linear(x, weight, None))


def test_not_finite_and_zero_rows(level: str) -> None:
    for static in (False, True):
        weight = random_layer(20, 150, 4, wide=0.2, static=static)
        x = random_input(7, weight)
        x[1, 3], x[2, 149], x[3, 70] = torch.nan, torch.inf, -torch.inf
        x[4] = 0
        bias = torch.randn(20)
        y = multiply(weight, x, bias)
        assert_same_bits(y, reference.linear(x, weight, bias))
        assert y.isnan().all(1).tolist() == [False, True, True, True, False, False, False]
        assert torch.equal(y[4], bias)


def test_degenerate_layers(level: str) -> None:
    constant = FlatWeight.pack(
        torch.full((9, 70), 7), torch.ones(9), torch.full((70,), 7), 4, None, None
    )
    dead = FlatWeight.pack(
        torch.zeros(9, 70), torch.zeros(9), torch.full((70,), 127), 8, None, None
    )
    enormous = torch.full((70,), 127)
    enormous[33] = 2**22
    one = FlatWeight.pack(torch.randint(-1, 2, (9, 70)), torch.rand(9), enormous, 8)
    every = random_layer(9, 70, 8, wide=1.0)
    for weight in (constant, dead, one, every):
        for rows in (0, 1, 20):
            x = random_input(rows, weight)
            assert_same_bits(multiply(weight, x), reference.linear(x, weight, None))
    x = torch.full((3, 70), 0.5)
    assert_same_bits(multiply(constant, x), reference.linear(x, constant, None))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_depend_on_the_batch(level: str, bits: int) -> None:
    weight = random_layer(75, 300, bits)
    spec, kernel = spec_of(weight), cpu.CpuFlatKernel()
    tensors = kernel.prepare(weight, spec)
    x = random_input(530, weight)  # past the rows that are multiplied together
    together = kernel.linear(x, tensors, None, spec)
    assert_same_bits(together, reference.linear(x, weight, None))
    for rows in (slice(0, 1), slice(5, 12), slice(100, 117), slice(511, 514), slice(529, 530)):
        assert torch.equal(kernel.linear(x[rows], tensors, None, spec), together[rows])


def test_strides_and_alignment(level: str) -> None:
    weight = random_layer(48, 96, 4)
    spec, kernel = spec_of(weight), cpu.CpuFlatKernel()
    tensors = kernel.prepare(weight, spec)
    for rows in (0, 1, 3, 64):
        x = random_input(rows, weight)
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


def test_threads_give_the_same_bits(level: str) -> None:
    weight = random_layer(500, 512, 4)
    spec, kernel = spec_of(weight), cpu.CpuFlatKernel()
    tensors = kernel.prepare(weight, spec)
    before = torch.get_num_threads()
    try:
        for rows in (1, 40):
            x = random_input(rows, weight)
            expected = reference.linear(x, weight, None)
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                assert_same_bits(kernel.linear(x, tensors, None, spec), expected)
                with ThreadPoolExecutor(4) as callers:
                    together = list(
                        callers.map(
                            lambda _, x=x: kernel.linear(x, tensors, None, spec), range(8)
                        )
                    )
                assert all(torch.equal(y, expected) for y in together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
def test_restore_and_memory(bits: int) -> None:
    for out, in_, wide in ((1, 1, 0.0), (100, 333, 0.1), (64, 64, 1.0)):
        weight = random_layer(out, in_, bits, wide=wide)
        kernel, spec = cpu.CpuFlatKernel(), spec_of(weight)
        assert torch.equal(kernel.restore(kernel.prepare(weight, spec), spec), weight.digits)
    weight = random_layer(512, 4096, bits, wide=0.02)
    resident = sum(t.numel() * t.element_size() for t in cpu.prepare(weight))
    stored = sum(t.numel() * t.element_size() for t in weight.tensors().values())
    assert resident < 1.1 * stored


def test_wrong_arguments_are_exceptions() -> None:
    weight = random_layer(48, 96, 4)
    tensors = cpu.prepare(weight)
    x = torch.randn(2, 96)

    def call(x: torch.Tensor, tensors: list[torch.Tensor], **changes: object) -> torch.Tensor:
        arguments = {"bias": None, "out": 48, "in": 96, "bits": 4, **changes}
        return torch.ops.lutra.cpu_flat_linear(x, *tensors, *arguments.values())

    assert call(x, tensors).shape == (2, 48)
    for bad in (
        torch.randn(2, 95), torch.randn(()), x.double(), x.to(torch.int32), x.to(torch.complex64),
        torch.randn(2, 96, device="meta"),
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(bad, tensors)
    for i in range(3):
        for change in (
            lambda t: t[:-1], lambda t: t.double(), lambda t: torch.cat([t, t])[::2],
            lambda t: t.to("meta"), lambda t: t[:0],
        ):  # fmt: skip
            broken = [change(t) if j == i else t for j, t in enumerate(tensors)]
            with pytest.raises((ValueError, RuntimeError)):
                call(x, broken)
    for changes in (
        {"bits": 8}, {"bits": 5}, {"out": 0}, {"out": 49}, {"out": 2**40}, {"in": 95},
        {"bias": torch.randn(47)}, {"bias": torch.ones(48, dtype=torch.int64)},
    ):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            call(x, tensors, **changes)
    with pytest.raises(ValueError):
        _native.set_flat_level("avx1024")


def test_damaged_plans_are_refused_or_harmless() -> None:
    """Whatever stands in a plan, nothing outside its tensors is read."""
    weight = random_layer(20, 70, 4, wide=0.3)
    data, scale, plan = cpu.prepare(weight)
    rng = random.Random(0)
    x = torch.randn(3, 70)
    for _ in range(2000):
        damaged = plan.clone()
        for _ in range(rng.choice([1, 3])):
            at = rng.randrange(rng.choice([8, len(plan)]))
            damaged[at] = rng.choice([-1, 0, 1, 64, 70, 128, 2**31 - 1, -(2**31), 12345])
        try:
            y = torch.ops.lutra.cpu_flat_linear(x, data, scale, damaged, None, 20, 70, 4)
        except (ValueError, RuntimeError):
            continue
        assert y.shape == (3, 20)


def test_damaged_layers_are_refused() -> None:
    weight = random_layer(20, 70, 4, static=True)
    assert weight.step is not None
    for value in (0.0, -1.0, torch.nan, torch.inf):
        weight.step = torch.tensor([value])
        with pytest.raises(KernelError, match="input_step"):
            cpu.prepare(weight)
    for value in (0, -5, 2**31 - 1):
        weight = random_layer(20, 70, 4)
        weight.limit[7] = value
        with pytest.raises(KernelError, match="input_limit"):
            cpu.prepare(weight)


def test_dispatch_and_op() -> None:
    weight = random_layer(70, 96, 8)
    spec = spec_of(weight)
    choose.cache_clear()
    choice = choose(spec)
    assert isinstance(choice, Choice) and choice.kernel.name == "cpu-flat"
    refused = FlatSpec(**{**spec.__dict__, "dtype": torch.float64})
    assert cpu.CpuFlatKernel().supports(refused)
    x, tensors = random_input(5, weight), cpu.prepare(weight)
    torch.library.opcheck(
        torch.ops.lutra.cpu_flat_linear.default, (x, *tensors, None, 70, 96, 8),
        test_utils=("test_schema", "test_faketensor"),
    )


CHILD = """
import torch
from test_kernels_flat_cpu import random_input, random_layer
from lutra.kernels.cpu import flat
from lutra.kernels.flat import reference
weight = random_layer(40, 100, 4)
x = random_input(20, weight)
y = flat._run(x, flat.prepare(weight), None, 40, 4)
assert torch.equal(y, reference.linear(x, weight, None))
print(flat.native().flat_level(), flat.native().level())
"""


def run_child(level: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(Path(cpu.__file__).parents[3]), str(root / "tests")])
    return subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "PYTHONPATH": path, "LUTRA_CPU_ISA": level},
        capture_output=True, text=True, timeout=600, check=False,
    )


def test_forced_level() -> None:
    lowest = run_child("portable")
    assert lowest.returncode == 0, lowest.stderr
    assert lowest.stdout.split() == ["portable", "portable"]
    if "amx" in LEVELS:
        best = run_child("amx")
        assert best.returncode == 0, best.stderr
        assert best.stdout.split()[0] == "amx"
    refused = run_child("mmx")
    assert refused.returncode != 0 and "LUTRA_CPU_ISA=mmx" in refused.stderr
