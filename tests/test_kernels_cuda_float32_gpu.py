"""Products with float32 activations against float64, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.cuda import CudaFloat32Kernel
from lutra.kernels.dispatch import LinearSpec, choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(33, 300), (128, 1024), (257, 2049), (5, 64)]


def _weight(
    rows: int, inputs: int, bits: int, group: int, uniform: bool, dtype: torch.dtype
) -> BitPlanes:
    groups = groups_per_row(inputs, group)
    signs = torch.randint(0, 2, (bits, rows, inputs), device="cuda") * 2 - 1
    scale = torch.rand(1 if uniform else bits, rows, groups, device="cuda") + 0.1
    offset = torch.randn(rows, groups, device="cuda")
    return BitPlanes.from_signs(signs, scale.to(dtype), offset.to(dtype), group)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("uniform", [False, True])
def test_nothing_but_sums_is_rounded(bits: int, uniform: bool) -> None:
    torch.manual_seed(bits)
    kernel = CudaFloat32Kernel()
    for index, ((rows, inputs), group) in enumerate(
        itertools.product(SHAPES, (32, 96, 128, 512, 1 << 20))
    ):
        scale = (torch.float16, torch.float32)[index % 2]
        weight = _weight(rows, inputs, bits, min(group, -(-inputs // 32) * 32), uniform, scale)
        spec = LinearSpec.of(weight, torch.float32)
        assert kernel.supports(spec) is None
        prepared = kernel.prepare(weight, spec)
        dense = weight.unpack(torch.float64)
        for tokens in (1, 3, 8, 17, 65):
            bias = torch.randn(rows, device="cuda") if tokens % 2 else None
            x = torch.randn(tokens, inputs, device="cuda")
            y = kernel.linear(x, prepared, bias, spec)
            exact = x.double() @ dense.T + (0 if bias is None else bias.double())
            terms = x.double().abs() @ dense.abs().T
            assert ((y.double() - exact).abs() <= 2e-6 * terms + 1e-7).all()
            assert torch.equal(y, kernel.linear(x, prepared, bias, spec))
        restored = kernel.restore(prepared, spec).tensors()
        assert all(torch.equal(restored[name], t) for name, t in weight.tensors().items())


def test_float32_layers_take_this_kernel() -> None:
    weight = _weight(48, 256, 3, 128, False, torch.float16)
    spec = LinearSpec.of(weight, torch.float32)
    assert choose(spec).kernel.name == "cuda-float32"
    kernel = CudaFloat32Kernel()
    prepared = kernel.prepare(weight, spec)
    x = torch.randn(2, 3, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, prepared, None, spec)
    graph.replay()
    assert torch.equal(y, kernel.linear(x, prepared, None, spec))
    assert kernel.linear(x[:0], prepared, None, spec).shape == (0, 3, 48)
    with pytest.raises(RuntimeError, match="float32"):
        kernel.linear(x.half(), prepared, None, spec)
