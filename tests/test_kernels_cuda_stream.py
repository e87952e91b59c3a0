"""`stream_linear.cu`: its plans, and what the compiler makes of them. Needs NVRTC, not a GPU."""

from __future__ import annotations

import pytest
import torch
from compiled import complaint

from lutra.errors import KernelError
from lutra.kernels.cuda import nvrtc
from lutra.kernels.cuda.launch import TYPICAL_CARDS
from lutra.kernels.cuda.layout import layout_of
from lutra.kernels.cuda.products import stream_defines
from lutra.kernels.cuda.stream_plans import (
    ARRANGERS,
    StreamPlan,
    stream_fits,
    stream_plans,
    stream_sizes,
)

H200 = TYPICAL_CARDS["sm_90a"]
SHAPES = [(1, 100), (33, 300), (4096, 4096), (40000, 1280), (49152, 12288), (640, 24576)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plans_cover_the_matrix_and_fit(bits: int) -> None:
    for shape in SHAPES:
        layout = layout_of(*shape, bits, 128, True)
        for tokens in (1, 8, 13, 16):
            plans = stream_plans(layout, True, 2, tokens, H200)
            assert plans
            for plan in plans:
                sizes = stream_sizes(plan, layout)
                rows = plan.clusters * plan.warps // plan.k_warps * plan.tiles * 16
                assert rows * sizes.passes >= shape[0] and plan.tokens >= tokens
                assert sizes.shared_bytes < H200.shared_bytes and plan.threads <= 1024
                assert stream_fits(plan, layout, True, 2, tokens, H200)
        assert not stream_plans(layout, True, 2, 17, H200)
        assert not stream_plans(layout, True, 2, 8, TYPICAL_CARDS["sm_100a"])
        assert not stream_plans(layout, True, 4, 8, H200)
        assert bits == 1 or not stream_plans(layout, False, 2, 8, H200)


@pytest.mark.parametrize("bits, tokens, tiles, warps", [
    (3, 16, 4, 12), (4, 16, 4, 12), (4, 8, 2, 16), (2, 16, 1, 9), (4, 16, 2, 14), (1, 8, 4, 8),
])
def test_compiles_with_the_registers_that_it_shares_out(
    bits: int, tokens: int, tiles: int, warps: int
) -> None:
    """With fewer of them the multiplying warps would wait for the others' without end."""
    layout = layout_of(4096, 4096, bits, 128, True)
    plan = StreamPlan("stream_linear", tokens, tiles, warps, 1, 3, 2, 4, 2, 8)
    x = (torch.float16, torch.bfloat16)[bits % 2 == 0]
    defines = stream_defines(plan, layout, True, torch.float16, x)
    try:
        found = complaint("stream_linear", defines, "sm_90a")
    except KernelError as error:
        if "NVRTC" in str(error) and "cannot compile" not in str(error):
            pytest.skip(str(error))
        raise
    assert found is None, found
    if warps % 4 == 0:
        options = ["--gpu-architecture=sm_90a", *nvrtc.COMMON_OPTIONS, "--ptxas-options=-v"]
        options += [f"-D{key}={value}" for key, value in defines.items()]
        _, log = nvrtc.compile_uncached(nvrtc.source("stream_linear"), options, "stream_linear.cu")
        registers = 65536 // ((warps + ARRANGERS) * 32) // 8 * 8
        assert f"Used {registers} registers" in log, log
