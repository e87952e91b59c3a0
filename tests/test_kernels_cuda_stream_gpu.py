"""Plans of `stream_linear.cu` against float64, on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_cuda_gpu import ROUNDING_ALLOWANCE, random_weight, rounding_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tokens", [5, 13])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plans_against_float64(bits: int, tokens: int) -> None:
    """Odd sizes, rows of x that are not aligned, outliers late in a row, bias, both types.

    Among the plans are some that go over x more than once, with room for all of it and without.
    """
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import run
    from lutra.kernels.cuda.stream_plans import stream_plans, stream_sizes

    torch.manual_seed(bits * 64 + tokens)
    shapes = [(1033, 300, 128), (700, 4128, 256), (1200, 2176, 1 << 20), (40000, 1280, 128)]
    for index, (out_features, in_features, group) in enumerate(shapes):
        group_size = min(group, in_features)
        weight = random_weight(out_features, in_features, bits, group_size, True)
        layout = layout_of(out_features, in_features, bits, group_size, True)
        planes, scales = to_kernel_order(weight, layout)
        dtype = (torch.float16, torch.bfloat16)[(index + bits) % 2]
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        x[0, -3] = 900.0
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        allowed = ROUNDING_ALLOWANCE * rounding_error(exact, dtype)
        plans = stream_plans(layout, True, 2, tokens, card(0))
        assert plans or card(0).capability != (9, 0)
        kinds = {
            (plan.tiles, plan.chunks > 2, stream_sizes(plan, layout).passes > 1): plan
            for plan in reversed(plans)
        }
        for plan in [*kinds.values()][index::4]:  # each compiles a kernel
            y = torch.full((2, tokens, out_features), float("nan"), device="cuda").to(dtype)
            for part in y:
                run(plan, x, planes, scales, bias, part, layout, True)
            assert (y[0].double() - exact).norm().item() <= allowed, plan
            assert torch.equal(y[0], y[1]), plan
