"""What of the CUDA kernels can be checked without a GPU: the layout, the plans, the fake op."""

from __future__ import annotations

import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.cuda import CudaKernel, kernels
from lutra.kernels.cuda.launch import Card
from lutra.kernels.cuda.layout import from_kernel_order, layout_of, to_kernel_order
from lutra.kernels.cuda.products import choose, plan_few, plan_field
from lutra.kernels.dispatch import LinearSpec

H200 = Card(0, "NVIDIA H200", (9, 0), 132, 232448)
L4 = Card(0, "NVIDIA L4", (8, 9), 58, 101376)


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool,
    dtype: torch.dtype,
) -> BitPlanes:
    groups = groups_per_row(in_features, group_size)
    signs = torch.randint(0, 2, (bits, out_features, in_features)) * 2 - 1
    scale = torch.rand(1 if uniform else bits, out_features, groups).to(dtype)
    return BitPlanes.from_signs(
        signs, scale, torch.randn(out_features, groups).to(dtype), group_size
    )


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256, 384, 512, 1 << 20])
@pytest.mark.parametrize("shape", [(16, 256), (1, 32), (33, 300), (50, 1000), (20, 1536)])
def test_layout_and_back(shape: tuple[int, int], group_size: int) -> None:
    torch.manual_seed(group_size)
    group_size = min(group_size, -(-shape[1] // 32) * 32)
    for bits, uniform, dtype in ((1, False, torch.float16), (3, False, torch.float32),
                                 (4, True, torch.float16)):
        weight = random_weight(*shape, bits, group_size, uniform, dtype)
        layout = layout_of(*shape, bits, group_size, weight.uniform)
        back = from_kernel_order(to_kernel_order(weight, layout), layout, group_size)
        for name, tensor in weight.tensors().items():
            assert torch.equal(back.tensors()[name], tensor), name


def test_layout_is_the_drawn_one() -> None:
    weight = random_weight(48, 512, 2, 128, False, torch.float16)
    layout = layout_of(48, 512, 2, 128, False)
    planes, scales = to_kernel_order(weight, layout)
    planes, scales = planes.view(3, 4, 2, 32, 2), scales.view(3, 4, 8, 3, 2)
    tile, slice_, q, g, t, half = 1, 3, 1, 5, 2, 1
    row = tile * 16 + half * 8 + g
    assert planes[tile, slice_, q, 4 * g + t, half] == weight.planes[q, row, slice_ * 4 + t]
    assert scales[tile, slice_, g, q, half] == weight.scale[q, row, slice_]
    assert scales[tile, slice_, g, 2, half] == weight.offset[row, slice_]


@pytest.mark.parametrize("card", [H200, L4], ids=lambda card: card.name)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_plans_fit_the_card(card: Card, bits: int) -> None:
    shapes = [(49152, 12288), (12288, 49152), (4096, 4096), (33, 96), (200000, 8192), (896, 4864)]
    for shape in shapes:
        for group_size in (32, 128, 1 << 20):
            layout = layout_of(*shape, bits, group_size, False)
            assert plan_few(layout, 2, 1, card) is not None
            for tokens in (1, 2, 3, 8, 16):
                plan = plan_few(layout, 4, tokens, card)
                if plan is not None:
                    assert plan.shared_bytes <= card.shared_bytes
                    assert plan.tokens >= tokens and plan.warps % plan.k_warps == 0
                    assert plan.panel_items >= min(plan.k_warps, layout.items)
            for tokens in (5, 16, 33, 100):
                field = plan_field(layout, False, tokens, H200)
                assert field.shared_bytes <= H200.shared_bytes
                assert field.tokens * field.token_tiles >= tokens
                assert field.row_blocks * field.warpgroups * 64 >= shape[0]


def test_choice_comes_with_a_reason() -> None:
    layout = layout_of(4096, 4096, 3, 128, True)
    names = [choose(layout, True, 2, tokens, H200)[0] for tokens in (1, 16, 4096)]
    assert names == ["few", "field", "dense"]
    assert choose(layout, True, 2, 40, L4) == choose(layout, True, 2, 41, L4)
    assert all(choose(layout, True, 2, tokens, L4)[1] for tokens in (1, 40))


def test_refusals_are_sentences() -> None:
    spec = LinearSpec(64, 256, 3, 128, False, torch.device("cpu"), torch.float16)
    assert "cpu" in (CudaKernel().supports(spec) or "")
    spec = LinearSpec(64, 256, 3, 128, False, torch.device("cuda", 0), torch.float32)
    assert "float32" in (CudaKernel().supports(spec) or "")
    spec = LinearSpec(64, 256, 3, 40, False, torch.device("cuda", 0), torch.float16)
    assert "40" in (CudaKernel().supports(spec) or "")
    if not torch.cuda.is_available():
        assert kernels() == []


def test_fake_op_gives_shape_and_dtype() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 256, dtype=torch.bfloat16)
        planes = torch.empty(16, dtype=torch.int32)
        y = torch.ops.lutra.cuda_linear(x, planes, planes, None, 40, 256, 3, 128, False)
        assert y.shape == (2, 5, 40) and y.dtype == torch.bfloat16
