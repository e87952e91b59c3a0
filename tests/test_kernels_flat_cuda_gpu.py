"""The flat CUDA kernels against the product of wide integers, bit for bit, on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

import lutra.kernels.cuda.flat_ops  # noqa: F401  (registers the ops)
from lutra.errors import LutraError
from lutra.formats.flat import FlatWeight, largest_digit, rotate_inputs
from lutra.kernels.flat import FlatSpec
from lutra.kernels.flat.before import ACTIVATIONS, Activation, Norm, apply
from lutra.kernels.flat.lowering import SMALLEST_STEP, activation_digits, quantize_input
from lutra.kernels.flat.reference import linear as reference_linear
from lutra.kernels.flat.reference import scale_output, wide_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def random_layer(
    out: int, inputs: int, bits: int, growth: float = 0.05, *, static: bool = False,
    smooth: bool = False, seed: int = 0,
) -> FlatWeight:
    """Some channels with two unary pieces, some with digits, some weights of several digits."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    most = largest_digit(bits)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=CUDA, generator=generator)

    limit = torch.full((inputs,), most, device=CUDA, dtype=torch.int64)
    kind = uniform(inputs)
    limit = torch.where(kind < growth, limit * 2, limit)
    limit = torch.where(kind < growth / 2, limit * 3, limit)
    limit = torch.where(kind < growth / 4, (2 * most + 1) * most + most, limit)
    pieces = torch.where(uniform(inputs) < growth / 2, 3, 1)
    wide = ((uniform(out, inputs) * 2 - 1) * (most * pieces + 0.49)).round().long()
    return FlatWeight.pack(
        wide, uniform(out) * 1e-3 + 1e-5, limit, bits,
        torch.tensor([0.02], device=CUDA) if static else None,
        uniform(inputs) + 0.5 if smooth else None,
    )


def random_input(layer: FlatWeight, tokens: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    x = torch.randn(tokens, layer.in_features, device=CUDA, generator=generator)
    return (x * layer.limit / layer.limit.min()).to(dtype)


def spec_of(layer: FlatWeight, dtype: torch.dtype) -> FlatSpec:
    return FlatSpec(
        layer.out_features, layer.in_features, layer.columns, layer.bits, layer.step is not None,
        layer.smooth is not None, CUDA, dtype,
    )


def check(layer: FlatWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    kernel, spec = CudaFlatKernel(), spec_of(layer, x.dtype)
    assert kernel.supports(spec) is None
    prepared = kernel.prepare(layer, spec)
    assert torch.equal(kernel.restore(prepared, spec), layer.digits)
    y = kernel.linear(x, prepared, bias, spec)
    expected = reference_linear(x, layer, bias)
    assert y.dtype == x.dtype and y.shape == expected.shape
    wrong = ~((y == expected) | (y.isnan() & expected.isnan()))
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {y.numel()} outputs differ, at {wrong.nonzero()[0].tolist()}: "
        f"{y[wrong][:4].tolist()} for {expected[wrong][:4].tolist()}"
    )
    assert y.equal(kernel.linear(x, prepared, bias, spec)) or y.isnan().any(), "two runs differ"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inputs"), [(8, 32), (200, 416), (1000, 1013), (640, 2048)])
def test_any_number_of_tokens(out: int, inputs: int, bits: int) -> None:
    layer = random_layer(out, inputs, bits)
    for tokens in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 100, 128, 129, 300, 513):
        check(layer, random_input(layer, tokens, torch.bfloat16))


@pytest.mark.parametrize(
    ("bits", "growth", "static", "smooth", "dtype"),
    [
        *itertools.product(
            [4, 8], [0.0, 0.3], [False, True], [False, True], [torch.float16, torch.bfloat16]
        )
    ],
)
def test_schemes(
    bits: int, growth: float, static: bool, smooth: bool, dtype: torch.dtype
) -> None:
    layer = random_layer(328, 840, bits, growth, static=static, smooth=smooth, seed=bits)
    for tokens, bias_dtype in ((3, dtype), (40, torch.float32), (150, None), (400, dtype)):
        bias = None
        if bias_dtype is not None:
            bias = torch.randn(328, device=CUDA).to(bias_dtype)
        check(layer, random_input(layer, tokens, dtype), bias)


@pytest.mark.parametrize("digit_bits", [4, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_of_other_cards(bits: int, digit_bits: int) -> None:
    """Warp-wide products, 4 bits too: Hopper emulates those."""
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Multiplier, prepare, restore
    from lutra.kernels.cuda.launch import card

    if digit_bits < bits:
        pytest.skip("digits must not be wider than the multiplier's")
    for growth, (out, inputs) in itertools.product((0.0, 0.2), ((8, 32), (300, 1013))):
        layer = random_layer(out, inputs, bits, growth)
        prepared = prepare(layer, Multiplier(digit_bits, False))
        assert torch.equal(restore(prepared, out, layer.columns, bits), layer.digits)
        for tokens in (1, 5, 17, 40, 64, 200):
            x = random_input(layer, tokens, torch.float16)
            q, step = flat_products.quantize(x, prepared)
            job = flat_products.job_of(prepared, out, tokens, x.dtype)
            plan = next(flat_products.mma_plans(job, card(0)))
            y = torch.full((tokens, out), torch.nan, dtype=x.dtype, device=CUDA)
            flat_products.run(plan, job, q, step, prepared, None, y)
            assert torch.equal(y, reference_linear(x, layer, None)), (growth, out, tokens)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_plan_gives_the_same(bits: int) -> None:
    from lutra.kernels.cuda import flat_products
    from lutra.kernels.cuda.flat_layout import Prepared, multiplier_of, prepare
    from lutra.kernels.cuda.launch import card

    device = card(0)
    if device.capability[0] != 9:
        pytest.skip("needs Hopper")
    layer = random_layer(1032, 3000, bits, 0.1)
    prepared: Prepared = prepare(layer, multiplier_of(device.capability, bits))
    assert prepared.registers == (bits == 4)
    for tokens in (5, 64, 300):
        x = random_input(layer, tokens, torch.bfloat16)
        expected = reference_linear(x, layer, None)
        q, step = flat_products.quantize(x, prepared)
        job = flat_products.job_of(prepared, 1032, tokens, x.dtype)
        plans = [*flat_products.few_plans(job, device), *flat_products.linear_plans(job, device)]
        for plan in plans:
            y = torch.full_like(expected, torch.nan)
            flat_products.run(plan, job, q, step, prepared, None, y)
            assert torch.equal(y, expected), plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("digit_bits", [4, 8])
def test_integers_of_activations(dtype: torch.dtype, digit_bits: int) -> None:
    """Every column, halves included: inputs that lie where rounding is decided."""
    from lutra.kernels.cuda.flat_layout import Multiplier, lower_rows, prepare
    from lutra.kernels.cuda.flat_products import quantize

    widths = (40, 1001, 8200, 17000, 50000)
    for inputs, static, smooth in itertools.product(widths, (False, True), (False, True)):
        layer = random_layer(16, inputs, 4, 0.2, static=static, smooth=smooth, seed=inputs)
        prepared = prepare(layer, Multiplier(digit_bits, False))
        lowered = lower_rows(layer, 0, 16, digit_bits)
        for tokens in (1, 70, 700) if inputs < 9000 else (1, 270):
            x = random_input(layer, tokens, torch.float32, seed=tokens)
            if static and not smooth:
                x = (x / 0.02).round() * 0.02 + 0.01
            x = x.to(dtype)
            q, step = quantize(x, prepared)
            wide, steps = quantize_input(x, layer.limit, layer.step, layer.smooth)
            assert torch.equal(step[:tokens], steps)
            expected = activation_digits(wide, lowered)
            if digit_bits == 4:
                low, high = (q << 4) >> 4, q >> 4
                q = torch.stack([low, high], dim=-1).flatten(1)
            filled = lowered.origin >= 0
            assert torch.equal(q[:, filled], expected[:, filled]), (inputs, static, smooth, tokens)


@pytest.mark.parametrize("bits", [4, 8])
def test_hard_tokens(bits: int) -> None:
    """Zeros, single values, the largest and smallest floats; NaN and infinity spoil their token."""
    layer = random_layer(64, 256, bits)
    x = torch.zeros(12, 256, device=CUDA)
    x[1, 5] = 3.0
    x[2] = 1.0
    x[3, 7] = torch.finfo(torch.bfloat16).max
    x[4] = SMALLEST_STEP
    x[5, 0], x[6, 255], x[7, 3] = torch.nan, torch.inf, -torch.inf
    wide_channel = int(layer.limit.argmax())
    x[8, wide_channel], x[9, wide_channel] = torch.nan, 1e30
    x[10] = 1e-40
    x[11] = -1e30
    x = x.bfloat16()
    check(layer, x)
    check(layer, x.repeat(20, 1))


def test_enormous_dead_and_constant_channels() -> None:
    limit = torch.full((512,), 7, device=CUDA, dtype=torch.int64)
    limit[17] = 7 * 4000
    wide = torch.randint(-7, 8, (96, 512), device=CUDA)
    wide[:, 40] = 0
    layer = FlatWeight.pack(wide, torch.ones(96, device=CUDA), limit, 4)
    x = torch.randn(80, 512, device=CUDA)
    x[:, 40], x[:, 41] = 0, 1
    x[:, 17] *= 4000
    check(layer, x.bfloat16())
    check(layer, x[:3].bfloat16())


def test_weights_whose_sixteenfold_sums_overflow_are_kept_in_8_bits() -> None:
    from lutra.kernels.cuda.flat_layout import multiplier_of, prepare

    limit = torch.full((4096,), 7 * 1000, device=CUDA, dtype=torch.int64)
    layer = FlatWeight.pack(
        torch.full((64, 4096), 7, device=CUDA), torch.ones(64, device=CUDA), limit, 4
    )
    assert not prepare(layer, multiplier_of((9, 0), 4)).registers
    check(layer, random_input(layer, 5, torch.bfloat16))
    check(layer, torch.full((200, 4096), 3.0, device=CUDA, dtype=torch.bfloat16))


def test_shapes_of_inputs() -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layer = random_layer(136, 512, 8)
    kernel, spec = CudaFlatKernel(), spec_of(layer, torch.float16)
    prepared = kernel.prepare(layer, spec)
    assert kernel.linear(torch.empty(0, 512, device=CUDA).half(), prepared, None, spec).shape == (
        0, 136,
    )
    x = random_input(layer, 12, torch.float16)
    expected = reference_linear(x, layer, None)
    y = kernel.linear(x.view(2, 3, 2, 512), prepared, None, spec)
    assert torch.equal(y, expected.view(2, 3, 2, 136))
    apart = torch.zeros(12, 700, device=CUDA, dtype=torch.float16)
    for offset in (0, 3, 8):
        apart[:, offset : offset + 512] = x
        rows = apart[:, offset : offset + 512]
        assert torch.equal(kernel.linear(rows, prepared, None, spec), expected)
    assert torch.equal(kernel.linear(x.T.contiguous().T, prepared, None, spec), expected)


def test_errors_say_what_is_wrong() -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layer = random_layer(64, 128, 8)
    kernel, spec = CudaFlatKernel(), spec_of(layer, torch.float16)
    prepared = kernel.prepare(layer, spec)
    x = random_input(layer, 4, torch.float16)
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        kernel.linear(x.float(), prepared, None, spec)
    with pytest.raises(RuntimeError, match="the weight takes 128"):
        kernel.linear(x[:, :100], prepared, None, spec)
    with pytest.raises(RuntimeError, match="the bias is"):
        kernel.linear(x, prepared, torch.zeros(3, device=CUDA), spec)
    with pytest.raises((RuntimeError, NotImplementedError)):
        kernel.linear(x.cpu(), prepared, None, spec)
    refusal = kernel.supports(spec_of(layer, torch.float32))
    assert refusal is not None and "float32" in refusal


@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_graph(bits: int) -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layer = random_layer(512, 1024, bits)
    kernel, spec = CudaFlatKernel(), spec_of(layer, torch.bfloat16)
    prepared = kernel.prepare(layer, spec)
    for tokens in (1, 70, 300):
        x = random_input(layer, tokens, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing was run before: prepare has loaded all kernels
            y = kernel.linear(x, prepared, None, spec)
        for seed in range(3):
            x.copy_(random_input(layer, tokens, torch.bfloat16, seed=seed))
            y.zero_()
            graph.replay()
            assert torch.equal(y, reference_linear(x, layer, None))


def test_torch_compile_and_opcheck() -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layer = random_layer(128, 256, 4)
    kernel, spec = CudaFlatKernel(), spec_of(layer, torch.float16)
    prepared = kernel.prepare(layer, spec)
    x = random_input(layer, 20, torch.float16)
    bias = torch.randn(128, device=CUDA, dtype=torch.float16)
    torch.library.opcheck(torch.ops.lutra.cuda_flat_linear, (x, *prepared, bias, 128, 256))

    @torch.compile(fullgraph=True)
    def function(x: torch.Tensor) -> torch.Tensor:
        return kernel.linear(x * 2, prepared, bias, spec) + 1

    assert torch.equal(function(x), reference_linear(x * 2, layer, bias) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [32, 64, 256, 1024])
def test_rotated_inputs(block: int, dtype: torch.dtype) -> None:
    """The bits of the definition in torch; blocks of any channels, rows that lie apart."""
    for inputs, tokens in ((1100, 0), (1100, 1), (1031, 7), (4096, 300), (14336, 9)):
        blocks = (inputs - 1) // block
        order = torch.randperm(inputs, device=CUDA)[: blocks * block].to(torch.int32)
        rotated = order.view(blocks, block)
        x = (torch.randn(tokens, inputs + 3, device=CUDA) * 10).to(dtype)[:, 1 : inputs + 1]
        y = torch.ops.lutra.cuda_flat_rotate(x, rotated)
        assert torch.equal(y, rotate_inputs(x, rotated)), (inputs, tokens)


SIZES = ((256, 3), (1013, 100), (2048, 70), (8200, 300), (17000, 100))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True])
def test_activations_on_the_way(smooth: bool, dtype: torch.dtype) -> None:
    """The bits of the modules by themselves."""
    from lutra.kernels.cuda.flat import CudaFlatKernel

    kernel = CudaFlatKernel()
    for inputs, tokens in SIZES:
        layer = random_layer(136, inputs, 8, 0.1, smooth=smooth)
        spec = spec_of(layer, dtype)
        prepared = kernel.prepare(layer, spec)
        gate = torch.randn(tokens, 2 * inputs, device=CUDA).to(dtype)[:, :inputs]
        up = random_input(layer, tokens, dtype)
        for name, times in itertools.product(ACTIVATIONS, (None, up)):
            if inputs > 3000 and (name != "silu" or times is None):
                continue
            before = Activation(name, times)
            assert kernel.reads(before, spec)
            y = kernel.linear_of(gate, before, prepared, None, spec)
            expected = reference_linear(apply(gate, before), layer, None)
            assert torch.equal(y, expected), (inputs, name, times is None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_norms_on_the_way(bits: int, dtype: torch.dtype) -> None:
    """As the modules by themselves, but for the order in which squares are added; and a token's
    norm does not depend on the other tokens of its batch."""
    from lutra.kernels.cuda.flat import CudaFlatKernel

    kernel = CudaFlatKernel()
    for inputs, tokens in SIZES:
        layer = random_layer(136, inputs, bits, 0.1)
        spec = spec_of(layer, dtype)
        prepared = kernel.prepare(layer, spec)
        weight = torch.rand(inputs, device=CUDA).to(dtype)
        bias = torch.randn(inputs, device=CUDA).to(dtype)
        x = random_input(layer, tokens, dtype).view(1, tokens, inputs) + 0.5
        for before in (Norm(weight, 1e-5), Norm(weight, 1e-5, bias)):
            y = kernel.linear_of(x, before, prepared, None, spec)
            expected = reference_linear(apply(x, before), layer, None)
            assert y.shape == expected.shape
            error = (y.double() - expected.double()).norm() / expected.double().norm()
            assert error < 2e-2, (inputs, error)
            few = kernel.linear_of(x[:, :2], before, prepared, None, spec)
            assert torch.equal(few, y[:, :2]), inputs


def test_streams_and_repetition() -> None:
    """Launches that follow each other at once, as programmatic dependent launch lets them."""
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layers = [random_layer(1024, 1024, bits, seed=bits) for bits in (8, 4, 8, 4)]
    kernel = CudaFlatKernel()
    prepared = [kernel.prepare(layer, spec_of(layer, torch.bfloat16)) for layer in layers]
    for tokens in (2, 48, 500):
        x = random_input(layers[0], tokens, torch.bfloat16)
        expected = x
        for layer in layers:
            expected = reference_linear(expected, layer, None)
        for _ in range(50):
            y = x
            for layer, tensors in zip(layers, prepared, strict=True):
                y = kernel.linear(y, tensors, None, spec_of(layer, torch.bfloat16))
            assert torch.equal(y, expected)


def test_unprepared_cards_are_refused_in_words() -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel

    layer = random_layer(64, 128, 8)
    on_cpu = spec_of(layer, torch.float16)
    on_cpu = FlatSpec(**{**vars(on_cpu), "device": torch.device("cpu")})
    refusal = CudaFlatKernel().supports(on_cpu)
    assert refusal is not None and "not on a CUDA device" in refusal
    assert issubclass(LutraError, Exception)


def test_large_product_against_sampled_rows() -> None:
    for bits in (4, 8):
        layer = random_layer(4104, 8192, bits, 0.03)
        x = random_input(layer, 2100, torch.bfloat16)
        q, step = quantize_input(x, layer.limit, None)
        from lutra.kernels.cuda.flat import CudaFlatKernel

        kernel, spec = CudaFlatKernel(), spec_of(layer, torch.bfloat16)
        y = kernel.linear(x, kernel.prepare(layer, spec), None, spec)
        rows = torch.randperm(2100, device=CUDA)[:64]
        acc = wide_product(q[rows], layer.wide())
        expected = scale_output(acc, step[rows], layer.scale, None, x.dtype)
        assert torch.equal(y[rows], expected)
