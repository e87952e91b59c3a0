"""`place_batch.cu` by every plan, against the float64 product of the stored weight."""

from __future__ import annotations

import pytest
import torch
from test_kernels_cuda_gpu import ROUNDING_ALLOWANCE, random_weight, rounding_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("tokens", [5, 16, 27, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_plan(bits: int, tokens: int) -> None:
    """Odd sizes, groups of one row, rows of x that are not aligned, outliers, bias, both types."""
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.place_batch_plans import place_batch_plans
    from lutra.kernels.cuda.products import run

    torch.manual_seed(bits * 64 + tokens)
    shapes = [(33, 300, 128), (700, 4128, 256), (1200, 2176, 128), (515, 6000, 6000)]
    for index, (out_features, in_features, group_size) in enumerate(shapes):
        weight = random_weight(out_features, in_features, bits, group_size, False)
        weight.scale[0].mul_(torch.where(torch.rand_like(weight.scale[0]) < 0.5, -1, 1))
        layout = layout_of(out_features, in_features, bits, group_size, False)
        planes, scales = to_kernel_order(weight, layout)
        torch.cuda.synchronize()
        dtype = (torch.float16, torch.bfloat16)[(index + bits) % 2]
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        if tokens >= 16:  # what an outlier costs differs from token to token
            x[torch.arange(tokens), torch.randint(in_features, (tokens,))] *= 1000
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        allowed = ROUNDING_ALLOWANCE * rounding_error(exact, dtype)
        plans = place_batch_plans(layout, False, 2, tokens, card(0))
        assert plans or card(0).capability != (9, 0)
        for plan in plans:
            y = torch.full((2, tokens, out_features), float("nan"), device="cuda").to(dtype)
            for part in y:
                run(plan, x, planes, scales, bias, part, layout, False)
            assert (y[0].double() - exact).norm().item() <= allowed, plan
            assert torch.equal(y[0], y[1]), plan


def test_rows_of_results_that_are_not_side_by_side() -> None:
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.place_batch_plans import place_batch_plans
    from lutra.kernels.cuda.products import run

    torch.manual_seed(5)
    weight = random_weight(410, 1024, 3, 128, False)
    layout = layout_of(410, 1024, 3, 128, False)
    planes, scales = to_kernel_order(weight, layout)
    torch.cuda.synchronize()
    x = torch.randn(20, 1024, device="cuda").half()
    exact = x.double() @ weight.unpack(torch.float64).T
    whole = torch.full((20, 500), 7.0, device="cuda").half()
    for plan in place_batch_plans(layout, False, 2, 20, card(0))[:1]:
        run(plan, x, planes, scales, None, whole[:, 33:443], layout, False)
        error = (whole[:, 33:443].double() - exact).norm().item()
        assert error <= ROUNDING_ALLOWANCE * rounding_error(exact, torch.float16)
        assert (whole[:, :33] == 7).all() and (whole[:, 443:] == 7).all()
