"""The CUDA kernels against the float64 product of the stored weight, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.kernels.dispatch import LinearSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING_ALLOWANCE = 1.2  # times the error of rounding the exact result to the output type
DENSE_ALLOWANCE = 2.0  # where the weight, too, is rounded to the output type


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, uniform: bool,
    scale_dtype: torch.dtype = torch.float16,
) -> BitPlanes:
    groups = groups_per_row(in_features, group_size)
    signs = torch.randint(0, 2, (bits, out_features, in_features), device="cuda") * 2 - 1
    scale = torch.rand(1 if uniform else bits, out_features, groups, device="cuda") + 0.1
    offset = torch.randn(out_features, groups, device="cuda")
    return BitPlanes.from_signs(
        signs, scale.to(scale_dtype), offset.to(scale_dtype), group_size
    )


def spec_of(weight: BitPlanes, dtype: torch.dtype) -> LinearSpec:
    return LinearSpec(
        weight.out_features, weight.in_features, weight.bits, weight.group_size, weight.uniform,
        weight.planes.device, dtype,
    )


def rounding_error(exact: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding the exact result to ``dtype`` costs."""
    return (exact.to(dtype).double() - exact).norm().item()


def check(weight: BitPlanes, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    from lutra.kernels.cuda import CudaKernel

    kernel, spec = CudaKernel(), spec_of(weight, x.dtype)
    assert kernel.supports(spec) is None
    prepared = kernel.prepare(weight, spec)
    y = kernel.linear(x, prepared, bias, spec)
    exact = x.double() @ weight.unpack(torch.float64).T
    if bias is not None:
        exact = exact + bias.double()
    assert y.dtype == x.dtype and y.shape == exact.shape
    rounding = rounding_error(exact, x.dtype)
    error = (y.double() - exact).norm().item()
    dense = kernel.describe(spec, x.shape[0], weight.scale.dtype)[0] == "dense"
    allowance = DENSE_ALLOWANCE if dense else ROUNDING_ALLOWANCE
    allowed = allowance * max(rounding, 1e-7 * exact.norm().item())
    assert error <= allowed, (
        f"{tuple(x.shape)} {spec}: {error / rounding:.3f} times the rounding error"
    )
    assert torch.equal(y, kernel.linear(x, prepared, bias, spec)), "two runs differ"
    restored = kernel.restore(prepared, spec)
    for name, tensor in weight.tensors().items():
        assert torch.equal(restored.tensors()[name], tensor), name


SHAPES = [(16, 256), (1, 32), (5, 40), (33, 96), (130, 300), (64, 1000), (257, 1088), (48, 4128)]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_group_and_odd_shape(bits: int, uniform: bool) -> None:
    torch.manual_seed(bits)
    cases = itertools.product(SHAPES, (32, 64, 128, 256, 384, 1 << 20))
    for index, ((out_features, in_features), group) in enumerate(cases):
        group_size = min(group, -(-in_features // 32) * 32)
        dtype = (torch.float16, torch.bfloat16)[index % 2]
        scale = (torch.float16, torch.float32)[index // 2 % 2]
        weight = random_weight(out_features, in_features, bits, group_size, uniform, scale)
        batch = (1, 2, 3, 4, 1, 5, 11)[index % 7]
        x = torch.randn(batch, in_features, device="cuda").to(dtype) * 10 ** (index % 4 - 2)
        check(weight, x)


@pytest.mark.parametrize("batch", [1, 4, 6, 8, 9, 16, 17, 33, 64, 65, 128, 200, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches(batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(batch)
    formats = (
        (False, 3, 128), (True, 4, 128), (True, 3, 32), (False, 2, 64), (False, 4, 1 << 20),
        (True, 2, 512), (False, 1, 384),
    )
    for uniform, bits, group_size in formats:
        group_size = min(group_size, 1152)
        weight = random_weight(328, 1152, bits, group_size, uniform)
        x = torch.randn(batch, 1152, device="cuda").to(dtype)
        bias = torch.randn(328, device="cuda").to(dtype)
        check(weight, x, bias)


def test_rows_longer_than_shared_memory() -> None:
    torch.manual_seed(0)
    for batch in (1, 2, 4, 7, 16):
        weight = random_weight(80, 53248 + 96, 3, 128, False)
        check(weight, torch.randn(batch, 53248 + 96, device="cuda").half())


def test_many_rows_and_outliers() -> None:
    torch.manual_seed(1)
    weight = random_weight(20000, 512, 3, 128, False)
    x = torch.randn(2, 512, device="cuda").half()
    x[0, 3], x[1, 200] = 3000, -1000
    check(weight, x)


def test_not_contiguous_empty_and_extra_dimensions() -> None:
    from lutra.kernels.cuda import CudaKernel

    torch.manual_seed(2)
    weight = random_weight(40, 256, 3, 64, True)
    kernel, spec = CudaKernel(), spec_of(weight, torch.float16)
    prepared = kernel.prepare(weight, spec)
    wide = torch.randn(6, 3, 512, device="cuda").half()
    for x in (wide[..., :256], wide[..., ::2], wide[::2, :, 256:], wide[:0, :, :256],
              wide.transpose(0, 1)[..., 3:259], torch.randn(256, device="cuda").half()):
        y = kernel.linear(x, prepared, None, spec)
        exact = x.double() @ weight.unpack(torch.float64).T
        assert y.shape == exact.shape
        assert torch.allclose(y.double(), exact, rtol=2e-3, atol=2e-2)


def test_graph_capture_and_compile() -> None:
    from lutra.kernels.cuda import CudaKernel

    torch.manual_seed(3)
    weight = random_weight(256, 512, 3, 128, False)
    kernel, spec = CudaKernel(), spec_of(weight, torch.float16)
    prepared = kernel.prepare(weight, spec)
    for batch in (1, 3, 12, 40):
        x = torch.randn(batch, 512, device="cuda").half()
        eager = kernel.linear(x, prepared, None, spec)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel.linear(x, prepared, None, spec)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, kernel.linear(x, prepared, None, spec))
        assert not torch.equal(captured, eager)
    compiled = torch.compile(
        lambda x: torch.relu(kernel.linear(x * 2, prepared, None, spec)), fullgraph=True
    )
    x = torch.randn(2, 512, device="cuda").half()
    assert torch.equal(compiled(x), torch.relu(kernel.linear(x * 2, prepared, None, spec)))


def test_values_that_are_not_finite_are_not_hidden() -> None:
    from lutra.kernels.cuda import CudaKernel

    weight = random_weight(32, 256, 2, 128, False)
    kernel, spec = CudaKernel(), spec_of(weight, torch.float16)
    prepared = kernel.prepare(weight, spec)
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 256, device="cuda").half()
        x[1, 7] = value
        y = kernel.linear(x, prepared, None, spec)
        assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any()


def test_wrong_arguments_are_named() -> None:
    from lutra.kernels.cuda import CudaKernel

    weight = random_weight(32, 256, 2, 128, False)
    kernel, spec = CudaKernel(), spec_of(weight, torch.float16)
    prepared = kernel.prepare(weight, spec)
    with pytest.raises(RuntimeError, match="256"):
        kernel.linear(torch.randn(1, 128, device="cuda").half(), prepared, None, spec)
    with pytest.raises(RuntimeError, match="float32"):
        kernel.linear(torch.randn(1, 256, device="cuda"), prepared, None, spec)


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 30, 64, 100, 200])
@pytest.mark.parametrize(("uniform", "bits"), [(u, b) for u in (False, True) for b in (2, 3, 4)])
def test_every_plan_gives_the_same_product(uniform: bool, bits: int, tokens: int) -> None:
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import add_steps, run
    from lutra.kernels.cuda.tuning import candidates

    torch.manual_seed(4)
    weight = random_weight(1200, 2176, bits, 128, uniform)
    layout = layout_of(1200, 2176, bits, 128, uniform)
    planes, scales = to_kernel_order(weight, layout)
    torch.cuda.synchronize()
    scales = add_steps(scales, layout, uniform)
    torch.cuda.synchronize()
    x = torch.randn(tokens, 2176, device="cuda").half()
    exact = x.double() @ weight.unpack(torch.float64).T
    rounding = rounding_error(exact, torch.float16)
    for plan in candidates(layout, uniform, 2, tokens, card(0)):
        y = torch.full((tokens, 1200), float("nan"), device="cuda").half()
        run(plan, x, planes, scales, None, y, layout, uniform)
        allowance = DENSE_ALLOWANCE if plan.kernel == "dense" else ROUNDING_ALLOWANCE
        assert (y.double() - exact).norm().item() <= allowance * rounding, plan


@pytest.mark.parametrize("uniform", [False, True])
def test_groups_of_any_scale(uniform: bool) -> None:
    """Alphas of zero, of either sign and of very different size; a row of nothing but zeros."""
    torch.manual_seed(6)
    for bits, group_size in ((1, 128), (2, 128), (3, 256), (4, 128)):
        weight = random_weight(130, 1024, bits, group_size, uniform)
        weight.scale.mul_(torch.where(torch.rand_like(weight.scale) < 0.5, -1, 1))
        weight.scale.mul_(10.0 ** torch.randint(-3, 2, weight.scale.shape[1:], device="cuda"))
        weight.scale[:, 3, 1], weight.scale[0, 4, 2], weight.scale[:, 5] = 0, 0, 0
        weight.offset[5] = 0
        for batch in (20, 40, 130, 300):
            x = torch.randn(batch, 1024, device="cuda").half()
            x[1, 7], x[2] = 30, x[2] * 1e-2
            check(weight, x)
            check(weight, x.bfloat16())


def test_many_tokens_and_odd_sizes() -> None:
    torch.manual_seed(7)
    for (out_features, in_features), uniform, bits in itertools.product(
        [(1, 32), (33, 300), (200, 1088), (500, 4128)], (False, True), (2, 3, 4)
    ):
        group_size = min(128, -(-in_features // 32) * 32)
        weight = random_weight(out_features, in_features, bits, group_size, uniform)
        for batch in (20, 63, 129, 1000):
            check(weight, torch.randn(batch, in_features, device="cuda").half())


@pytest.mark.parametrize("tokens", [8, 13, 32, 50])
@pytest.mark.parametrize("bits", range(1, 5))
def test_plans_of_code_batch(bits: int, tokens: int) -> None:
    """Odd sizes, groups of one row, rows of x that are not aligned, bias, both types."""
    from lutra.kernels.cuda.code_batch_plans import code_batch_plans
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import run

    torch.manual_seed(bits * 64 + tokens)
    shapes = [(33, 300, 128), (700, 4128, 256), (1200, 2176, 128)]
    for index, (out_features, in_features, group_size) in enumerate(shapes):
        weight = random_weight(out_features, in_features, bits, group_size, True)
        layout = layout_of(out_features, in_features, bits, group_size, True)
        planes, scales = to_kernel_order(weight, layout)
        torch.cuda.synchronize()
        dtype = (torch.float16, torch.bfloat16)[(index + bits) % 2]
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        allowed = ROUNDING_ALLOWANCE * rounding_error(exact, dtype)
        plans = code_batch_plans(layout, True, 2, tokens, card(0))
        assert plans or card(0).capability != (9, 0)
        for plan in plans[index::13]:
            y = torch.full((2, tokens, out_features), float("nan"), device="cuda").to(dtype)
            for part in y:
                run(plan, x, planes, scales, bias, part, layout, True)
            assert (y[0].double() - exact).norm().item() <= allowed, plan
            assert torch.equal(y[0], y[1]), plan


@pytest.mark.parametrize("tokens", [16, 64])
def test_code_batch_goes_from_block_to_block_of_rows(tokens: int) -> None:
    """More blocks of rows than the card has processors; chunks of slices that are not full."""
    from lutra.kernels.cuda.code_batch_plans import code_batch_plans, code_batch_row_blocks
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.products import run

    torch.manual_seed(tokens)
    out_features, in_features = 30001, 2300
    weight = random_weight(out_features, in_features, 3, 128, True)
    layout = layout_of(out_features, in_features, 3, 128, True)
    planes, scales = to_kernel_order(weight, layout)
    torch.cuda.synchronize()
    x = torch.randn(tokens, in_features, device="cuda").half()
    exact = x.double() @ weight.unpack(torch.float64).T
    allowed = ROUNDING_ALLOWANCE * rounding_error(exact, torch.float16)
    plans = [
        plan for plan in code_batch_plans(layout, True, 2, tokens, card(0))
        if not plan.split and code_batch_row_blocks(plan, layout) > card(0).processors
    ]
    assert plans or card(0).capability != (9, 0)
    for plan in plans:
        y = torch.full((2, tokens, out_features), float("nan"), device="cuda").half()
        for part in y:
            run(plan, x, planes, scales, None, part, layout, True)
        assert (y[0].double() - exact).norm().item() <= allowed, plan
        assert torch.equal(y[0], y[1]), plan


@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shape", [(33, 300, 128), (700, 4128, 256), (1200, 2176, 128)])
def test_plans_for_many_tokens(shape: tuple[int, int, int], uniform: bool, bits: int) -> None:
    """Plans of `code_prefill.cu`: odd sizes, groups of one row, bias, both types.

    A third of the plans for each weight, so that fewer kernels are compiled.
    """
    from lutra.kernels.cuda.launch import card
    from lutra.kernels.cuda.layout import layout_of, to_kernel_order
    from lutra.kernels.cuda.prefill_plans import prefill_plans
    from lutra.kernels.cuda.products import add_steps, run

    torch.manual_seed(8)
    out_features, in_features, group_size = shape
    weight = random_weight(out_features, in_features, bits, group_size, uniform)
    layout = layout_of(out_features, in_features, bits, group_size, uniform)
    planes, scales = to_kernel_order(weight, layout)
    torch.cuda.synchronize()
    scales = add_steps(scales, layout, uniform)
    torch.cuda.synchronize()
    dtypes = (torch.float16, torch.bfloat16)
    if group_size == 256:  # compiled anew: each type with every other width
        dtypes = (dtypes[(bits + uniform) % 2],)
    for tokens, dtype in itertools.product((65, 300, 700), dtypes):
        x = torch.randn(tokens, in_features + 1, device="cuda").to(dtype)[:, 1:]
        bias = torch.randn(out_features, device="cuda").to(dtype)
        exact = x.double() @ weight.unpack(torch.float64).T + bias.double()
        for plan in prefill_plans(layout, uniform, 2, tokens, card(0))[(bits + uniform) % 3 :: 3]:
            y = torch.full((tokens, out_features), float("nan"), device="cuda").to(dtype)
            run(plan, x, planes, scales, bias, y, layout, uniform)
            error = (y.double() - exact).norm().item()
            assert error <= ROUNDING_ALLOWANCE * rounding_error(exact, dtype), (plan, dtype)
