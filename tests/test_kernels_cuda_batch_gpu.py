"""Every kind of plan of `batch_linear.cu` for free levels against float64, on a GPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels_cuda_gpu import ROUNDING_ALLOWANCE, random_weight, rounding_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tokens", [5, 13, 30])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_plans_of_free_levels(bits: int, tokens: int) -> None:
    """Odd sizes, groups of one row, rows of x that are not aligned, bias, both types."""
    from lutra.kernels.cuda.batch_plans import batch_plans
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import add_steps, run

    torch.manual_seed(bits * 64 + tokens)
    shapes = [(1033, 300, 128), (700, 4128, 256), (1200, 2176, 1 << 20)]
    for index, (out_features, in_features, group) in enumerate(shapes):
        group_size = min(group, in_features)
        weight = random_weight(out_features, in_features, bits, group_size, False)
        layout = layout_of(out_features, in_features, bits, group_size, False)
        planes, scales = to_kernel_order(weight, layout)
        torch.cuda.synchronize()
        scales = add_steps(scales, layout, False)
        dtype = (torch.float16, torch.bfloat16)[(index + bits) % 2]
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        allowed = ROUNDING_ALLOWANCE * rounding_error(exact, dtype)
        plans = batch_plans(layout, False, 2, tokens, card(0))
        assert plans or card(0).capability != (9, 0)
        kinds = {(plan.signs, plan.tiles): plan for plan in reversed(plans)}
        for plan in [*kinds.values()][index::3]:  # each compiles a kernel
            y = torch.full((2, tokens, out_features), float("nan"), device="cuda").to(dtype)
            for part in y:
                run(plan, x, planes, scales, bias, part, layout, False)
            assert (y[0].double() - exact).norm().item() <= allowed, plan
            assert torch.equal(y[0], y[1]), plan
