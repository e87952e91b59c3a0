"""Inputs rotated in blocks: the definition, the format, what a loaded layer computes."""

from __future__ import annotations

import pytest
import torch

from lutra.errors import CheckpointError, SchemeError
from lutra.formats.flat import FlatWeight, rotate_inputs, rotated_blocks
from lutra.formats.layers import flat_format, stored_tensor_shapes
from lutra.kernels.flat.lowering import quantize_input
from lutra.kernels.flat.reference import linear
from lutra.nn_flat import FlatLinear
from lutra.scheme import Format
from lutra.solvers.gptq_loop import (
    damped,
    descend_integers,
    inverse_cholesky,
    refit_scales,
    round_integers_with_feedback,
)
from lutra.transforms.rotate import blocks_to_rotate


def matrix_of(width: int, rotated: torch.Tensor) -> torch.Tensor:
    """The whole rotation as a float64 matrix, from the definition of Hadamard matrices."""
    whole = torch.eye(width, dtype=torch.float64)
    block = rotated.shape[1]
    sign = [[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    hadamard = torch.tensor(sign, dtype=torch.float64) / block**0.5
    for row in rotated.long():
        whole[row[:, None], row[None, :]] = hadamard
    return whole


def layer(
    block: int, width: int = 75, bits: int = 4, static: bool = False, seed: int = 0
) -> FlatWeight:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) - 1
    wide = torch.randint(-most, most + 1, (13, width), generator=generator)
    limit = torch.where(torch.rand(width, generator=generator) < 0.1, 16 * most, most)
    return FlatWeight.pack(
        wide, torch.rand(13, generator=generator) + 0.1, limit, bits,
        torch.tensor([0.2]) if static else None,
        rotated_NB=blocks_to_rotate(torch.rand(width, generator=generator), block),
    )  # fmt: skip


@pytest.mark.parametrize(("block", "width"), [(2, 3), (4, 31), (8, 8 * 9), (64, 130), (256, 700)])
def test_a_rotation_is_the_hadamard_matrix_in_blocks_and_its_own_inverse(block: int, width: int):
    generator = torch.Generator().manual_seed(block)
    rotated = blocks_to_rotate(torch.rand(width, generator=generator), block)
    assert rotated.shape == (rotated_blocks(width, block), block)
    assert 1 <= width - rotated.numel() <= block
    assert len(set(rotated.flatten().tolist())) == rotated.numel()
    x = torch.randn(3, 5, width, generator=generator)
    y = rotate_inputs(x, rotated)
    exact = x.double() @ matrix_of(width, rotated)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate_inputs(y, rotated), x, rtol=1e-5, atol=1e-5)
    # No token's numbers depend on how many there are, nor on the shape.
    assert torch.equal(rotate_inputs(x[1, 2], rotated), y[1, 2])
    assert rotate_inputs(x[:0], rotated).shape == (0, 5, width)
    half = rotate_inputs(x.bfloat16(), rotated)
    assert torch.equal(half, rotate_inputs(x.bfloat16().float(), rotated).bfloat16())


def test_the_format_page_is_enough_to_rotate_inputs():
    """docs/FORMAT.md, `+had`, followed literally with numpy, bit for bit."""
    import numpy as np

    rotated = blocks_to_rotate(torch.rand(70), 32)
    x = torch.randn(5, 70)
    expected = x.numpy().copy()
    for row in rotated.numpy():
        v = x.numpy()[:, row]
        h = 1
        while h < 32:
            for j in range(32):
                if j // h % 2 == 0:
                    v[:, j], v[:, j + h] = v[:, j] + v[:, j + h], v[:, j] - v[:, j + h]
            h *= 2
        expected[:, row] = v * np.float32(1 / 32**0.5)
    assert torch.equal(rotate_inputs(x, rotated), torch.from_numpy(expected))


def test_the_widest_channels_are_not_rotated():
    size = torch.rand(100)
    size[[7, 50]] = 30.0
    assert not {7, 50} & set(blocks_to_rotate(size, 32).flatten().tolist())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_layer_is_its_definition(bits: int, static: bool, dtype: torch.dtype):
    weight = layer(16, bits=bits, static=static)
    bias = torch.randn(13)
    module = FlatLinear.from_weight(weight, bias)
    for tokens in (0, 1, 33):
        x = torch.randn(tokens, 75).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        turned = rotate_inputs(x, weight.rotated)
        q, step = quantize_input(turned, weight.limit, weight.step)
        exact = (q.double() @ weight.wide().double().T) * step[:, None].double() * weight.scale
        assert torch.equal(y, linear(x, weight, bias))
        rounding = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y.double(), exact + bias, rtol=rounding, atol=rounding)
    # The dense weight does the same to inputs that are not quantized.
    x = torch.randn(40, 75)
    dense = x.double() @ weight.unpack().double().T
    plain = (x.double() @ matrix_of(75, weight.rotated)) @ (
        weight.wide().double() * weight.scale[:, None]
    ).T
    torch.testing.assert_close(dense, plain, rtol=1e-4, atol=1e-4)


def test_the_format_says_how_inputs_are_rotated():
    weight = layer(16, static=True)
    format = flat_format(weight)
    assert str(format) == "flat4+static+had16" and Format.parse(str(format)) == format
    shapes = stored_tensor_shapes(format, 13, 75)
    stored = weight.tensors()
    assert shapes == {n: (t.dtype, tuple(t.shape)) for n, t in stored.items()}
    fresh = FlatLinear(75, 13, format)
    fresh.load_state_dict(FlatLinear.from_weight(weight).state_dict())
    x = torch.randn(7, 75)
    assert torch.equal(fresh(x), linear(x, weight, None))


@pytest.mark.parametrize("name", ["flat4+had3", "flat4+had0", "flat4+had1", "flat4+smooth+had64"])
def test_rotations_that_are_none(name: str):
    with pytest.raises(SchemeError):
        Format.parse(name)


def test_a_rotation_that_does_not_fit_its_layer_is_refused():
    stored = layer(16)
    with pytest.raises(CheckpointError, match="rotated"):
        FlatWeight(
            stored.digits, stored.scale, stored.limit, stored.source, 4, 75,
            rotated=stored.rotated[:2],
        )  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_every_pair_of_scales_is_the_wide_integer_product(bits, static, per_tensor, tokens):
    generator = torch.Generator().manual_seed(tokens)
    most = 2 ** (bits - 1) - 1
    wide = torch.randint(-2 * most, 2 * most + 1, (19, 83), generator=generator)
    limit = torch.where(torch.rand(83, generator=generator) < 0.2, (2 * most + 2) * most, most)
    scale = torch.rand(19, generator=generator) + 0.1
    if per_tensor:
        scale = scale[:1].expand(19)
    step = torch.tensor([0.03]) if static else None
    weight = FlatWeight.pack(wide, scale, limit, bits, step)
    x = torch.randn(tokens, 83, generator=generator) * limit / most
    q, steps = quantize_input(x, weight.limit, step)
    exact = (q.long() @ wide.T).float() * (steps[:, None] * scale)
    assert torch.equal(FlatLinear.from_weight(weight)(x), exact)


@pytest.mark.parametrize("width", [1, 5, 150])
@pytest.mark.parametrize("together", [False, True])
def test_descent_and_new_scales_never_raise_the_loss(width: int, together: bool):
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(300, width, generator=generator)
    rows = rows * torch.rand(width, generator=generator) + rows[:, :1]
    hessian = damped(rows.T @ rows / 300, 0.01)
    weight = torch.randn(24, width, generator=generator)
    weight[3] = 0
    linears = [slice(0, 10), slice(10, 24)] if together else None
    scale = weight.abs().amax(1).clamp_min(1e-3) / 7
    if linears:
        scale = torch.cat([scale[r].amax().expand(len(scale[r])) for r in linears])
    limit = torch.full((width,), 7)
    limit[::7] = 14

    def loss(integers: torch.Tensor, scale: torch.Tensor) -> float:
        error = (weight - integers * scale[:, None]).double()
        return float(((error @ hessian.double()) * error).sum())

    integers = round_integers_with_feedback(weight, inverse_cholesky(hessian), scale, limit)
    first = loss(integers, scale)
    refitted = refit_scales(weight, hessian, integers, scale, linears)
    assert loss(integers, refitted) <= first * (1 + 1e-6) + 1e-9
    again = descend_integers(weight, hessian, integers, refitted, limit)
    assert loss(again, refitted) <= loss(integers, refitted) * (1 + 1e-6) + 1e-9
    assert bool((again.abs() <= limit).all()) and torch.equal(again, again.round())
    assert bool((refitted > 0).all())
    if linears:
        assert all(len(refitted[r].unique()) == 1 for r in linears)
