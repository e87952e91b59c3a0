"""CPU kernels against the float64 product with the unpacked weight, on every level of this CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.cpu import linear as cpu
from lutra.kernels.dispatch import LinearSpec

_native = pytest.importorskip(
    "lutra.kernels.cpu._native", reason="the CPU extension was not built here"
)

LEVELS = _native.levels()
EXACT, FAST = 5e-5, 8e-3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.level()
    _native.set_level(request.param)
    cpu.most_rows_by_tables.cache_clear()
    yield request.param
    _native.set_level(before)
    cpu.most_rows_by_tables.cache_clear()


def random_weight(
    out: int, in_: int, bits: int, group: int, uniform: bool = False,
    dtype: torch.dtype = torch.float16, seed: int = 0,
) -> BitPlanes:
    rng = torch.Generator().manual_seed(seed)
    group = group if group > 0 else -(-in_ // 32) * 32
    groups = groups_per_row(in_, group)
    signs = torch.randint(0, 2, (bits, out, in_), generator=rng) * 2 - 1
    scale = torch.rand((1 if uniform else bits, out, groups), generator=rng) + 0.1
    offset = torch.randn((out, groups), generator=rng) * 0.3
    return BitPlanes.from_signs(signs, scale.to(dtype), offset.to(dtype), group)


def spec_of(weight: BitPlanes, dtype: torch.dtype) -> LinearSpec:
    return LinearSpec(
        weight.out_features, weight.in_features, weight.bits, weight.group_size, weight.uniform,
        torch.device("cpu"), dtype,
    )


def relative_error(y: torch.Tensor, x: torch.Tensor, weight: BitPlanes) -> float:
    """Error over the norm that outputs have for inputs of random sign, so that one output that
    happens to cancel does not decide."""
    x_f64, w_f64 = x.double(), weight.unpack(torch.float64)
    expected = (x_f64.square() @ w_f64.square().T).sum().sqrt()
    return float((y.double() - x_f64 @ w_f64.T).norm() / expected)


def multiply(weight: BitPlanes, x: torch.Tensor, fast: bool = False) -> torch.Tensor:
    kernel, spec = cpu.CpuKernel(fast), spec_of(weight, x.dtype)
    assert kernel.supports(spec) is None
    return kernel.linear(x, kernel.prepare(weight, spec), None, spec)


@pytest.mark.parametrize("group", [32, 64, 96, 128, 160, 256, -1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_grid(level: str, bits: int, group: int) -> None:
    for uniform, (out, in_), fast in (
        (False, (70, 416), False), (True, (129, 300), False), (True, (70, 416), True),
        (False, (1, 32), False),
    ):  # fmt: skip
        weight = random_weight(out, in_, bits, group, uniform)
        x = torch.randn(3, in_)
        error = relative_error(multiply(weight, x, fast), x, weight)
        # One output scatters around the error that many have together.
        assert error < (FAST if fast else EXACT) * (4 if out == 1 else 1), (uniform, out, in_, fast)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 17, 40])
def test_batches(level: str, rows: int) -> None:
    weight = random_weight(200, 512, 3, 128)
    x = torch.randn(rows, 512)
    assert relative_error(multiply(weight, x), x, weight) < EXACT


@pytest.mark.parametrize("bits", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("uniform", [False, True])
def test_decoding_matches_unpack(
    level: str, bits: int, uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "most_rows_by_tables", lambda *_: 0)
    weight = random_weight(75, 200, bits, 64, uniform)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)):
        x = torch.randn(90, 200).to(dtype)
        assert relative_error(multiply(weight, x), x, weight) < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(level: str, dtype: torch.dtype, scales: torch.dtype) -> None:
    weight = random_weight(50, 160, 2, 32, dtype=scales)
    x = torch.randn(2, 160).to(dtype)
    y = multiply(weight, x)
    assert y.dtype == dtype
    bound = {torch.float32: EXACT, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(y, x, weight) < bound


@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize("uniform", [False, True])
def test_restore_is_exact(level: str, uniform: bool, scales: torch.dtype) -> None:
    shapes = ((1, 1), (100, 333), (64, 64))
    for (out, in_), bits, group in itertools.product(shapes, (1, 4), (32, -1)):
        weight = random_weight(out, in_, bits, group, uniform, scales)
        kernel, spec = cpu.CpuKernel(False), spec_of(weight, torch.float32)
        back = kernel.restore(kernel.prepare(weight, spec), spec)
        for name, tensor in weight.tensors().items():
            restored = back.tensors()[name]
            assert torch.equal(tensor, restored) and tensor.dtype == restored.dtype


def test_joint_preparation_is_that_of_the_rows_together(level: str) -> None:
    kernel = cpu.CpuKernel(False)
    for rows in ((64, 128, 64), (128, 40), (64, 17), (48, 64)):
        for uniform in (False, True):
            weights = [random_weight(n, 200, 3, 64, uniform) for n in rows]
            whole = BitPlanes(
                torch.cat([w.planes for w in weights], 1),
                torch.cat([w.scale for w in weights], 1),
                torch.cat([w.offset for w in weights]),
                200,
                64,
            )
            spec = spec_of(whole, torch.float32)
            joint = kernel.prepare_joint(weights, spec)
            for part, expected in zip(joint, kernel.prepare(whole, spec), strict=True):
                assert torch.equal(part, expected)
            assert torch.equal(kernel.restore(joint, spec).planes, whole.planes)
