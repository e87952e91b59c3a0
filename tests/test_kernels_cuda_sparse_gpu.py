"""Plans of `sparse_linear.cu` against float64, on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_cuda_gpu import ROUNDING_ALLOWANCE, random_weight, rounding_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def multiply(weight, x: torch.Tensor, bias: torch.Tensor | None, every: int, first: int = 0):
    """Each of some plans with its two products, which are to be equal."""
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import run
    from lutra.kernels.cuda.sparse_plans import sparse_plans

    layout = layout_of(
        weight.out_features, weight.in_features, weight.bits, weight.group_size, False
    )
    planes, scales = to_kernel_order(weight, layout)
    torch.cuda.synchronize()
    plans = sparse_plans(layout, False, 2, x.shape[0], card(0))
    assert plans or card(0).capability != (9, 0)
    for plan in plans[first::every]:  # each compiles a kernel
        y = torch.full((2, x.shape[0], weight.out_features), float("nan"), device="cuda")
        y = y.to(x.dtype)
        for part in y:
            run(plan, x, planes, scales, bias, part, layout, False)
        assert torch.equal(y[0].view(torch.int16), y[1].view(torch.int16)), plan
        yield plan, y[0]


@pytest.mark.parametrize("tokens", [3, 5, 8])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_odd_sizes(bits: int, tokens: int) -> None:
    """Groups of one row, rows of x that are not aligned, bias, both types."""
    torch.manual_seed(bits * 64 + tokens)
    shapes = [(1033, 300, 128), (700, 4128, 256), (1200, 2176, 1 << 20), (33, 2080, 128)]
    for index, (out_features, in_features, group) in enumerate(shapes):
        weight = random_weight(out_features, in_features, bits, min(group, in_features), False)
        dtype = (torch.float16, torch.bfloat16)[(index + bits) % 2]
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        allowed = ROUNDING_ALLOWANCE * rounding_error(exact, dtype)
        for plan, y in multiply(weight, x, bias, 5, index):
            assert (y.double() - exact).norm().item() <= allowed, plan


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inputs_of_all_magnitudes(bits: int) -> None:
    """Outliers, tokens of very different size, inputs that differ by orders of magnitude."""
    torch.manual_seed(bits)
    weight = random_weight(2000, 1536, bits, 128, False)
    x = torch.randn(8, 1536, device="cuda")
    x[0] *= 1e-4
    x[1] *= 2000
    x[2, 7] = 3000
    x[3] **= 3
    x[4, ::2] *= 30
    x[5] = torch.rand(1536, device="cuda") + 1
    x[6] = 0
    x = x.half()
    dense = weight.unpack(torch.float64)
    for plan, y in multiply(weight, x, None, 8):
        for token in range(8):
            exact = x[token].double() @ dense.T
            error = (y[token].double() - exact).norm().item()
            assert error <= ROUNDING_ALLOWANCE * rounding_error(exact, x.dtype), (plan, token)


def test_values_that_are_not_finite_stay_in_their_token() -> None:
    weight = random_weight(64, 512, 3, 128, False)
    for value in (float("nan"), float("inf")):
        x = torch.randn(6, 512, device="cuda").half()
        x[1, 7] = value
        for plan, y in multiply(weight, x, None, 8):
            others = [token for token in range(6) if token != 1]
            assert torch.isfinite(y[others]).all() and not torch.isfinite(y[1]).any(), plan
