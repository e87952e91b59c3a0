"""Flattened integers: packing, thresholds, and every lowering against the wide-integer product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutra.errors import CheckpointError, SchemeError
from lutra.formats.flat import FlatWeight, largest_digit, pack_digits, unpack_digits
from lutra.kernels.flat import FlatSpec, choose
from lutra.kernels.flat.lowering import (
    accumulate,
    activation_digits,
    lower,
    quantize_input,
)
from lutra.kernels.flat.reference import wide_product
from lutra.transforms import flatten
from lutra.transforms.smooth import smoothing_scale

TOKENS = (0, 1, 7, 16, 17, 33, 128)


def random_weight(
    generator: torch.Generator,
    out_features: int,
    in_features: int,
    bits: int,
    *,
    weight_pieces: int = 1,
    most_pieces: int = 1,
    two_digits: bool = False,
    static: bool = False,
    smooth: bool = False,
) -> FlatWeight:
    """A random layer in which some channels are wide, in weights and in activations."""
    most = largest_digit(bits)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    pieces_I = torch.where(draw(0, 3, in_features) == 0, draw(1, weight_pieces, in_features), 1)
    wide_OI = (
        (torch.rand(out_features, in_features, generator=generator) * 2 - 1)
        * 1.02
        * pieces_I
        * most
    )
    wide_OI = wide_OI.round().clamp(-pieces_I * most, pieces_I * most)
    limit_I = torch.where(draw(0, 2, in_features) == 0, draw(1, most_pieces, in_features), 1) * most
    if two_digits:
        limit_I = torch.where(draw(0, 4, in_features) == 0, (2 * most + 2) * most, limit_I)
    return FlatWeight.pack(
        wide_OI,
        torch.rand(out_features, generator=generator) + 0.5,
        limit_I,
        bits,
        torch.tensor([0.01]) if static else None,
        torch.rand(in_features, generator=generator) + 0.5 if smooth else None,
    )


def random_input(generator: torch.Generator, tokens: int, weight: FlatWeight) -> torch.Tensor:
    x = torch.randn(tokens, weight.in_features, generator=generator)
    return x * weight.limit / largest_digit(weight.bits) * 0.4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    digit_bits=st.sampled_from([4, 8]),
    scheme=st.sampled_from(["digits", "unary"]),
    merge=st.booleans(),
    tile=st.sampled_from([1, 4, 32, 64]),
    tokens=st.sampled_from(TOKENS),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 150),
    weight_pieces=st.sampled_from([1, 2, 5]),
    most_pieces=st.sampled_from([1, 2, 3, 17, 64]),
    two_digits=st.booleans(),
    static=st.booleans(),
)
def test_every_lowering_is_the_wide_product(
    seed, bits, digit_bits, scheme, merge, tile, tokens, out_features, in_features, weight_pieces,
    most_pieces, two_digits, static,
):  # fmt: skip
    digit_bits = max(bits, digit_bits)
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(
        generator, out_features, in_features, bits, weight_pieces=weight_pieces,
        most_pieces=most_pieces, two_digits=two_digits, static=static,
    )  # fmt: skip
    q, _ = quantize_input(
        random_input(generator, tokens, weight), weight.limit, weight.step, weight.smooth
    )
    oracle = q.long() @ weight.wide().long().T
    assert torch.equal(wide_product(q, weight.wide()), oracle)

    lowered = lower(weight, digit_bits, tile, scheme, merge)
    digits = activation_digits(q, lowered)
    most = largest_digit(digit_bits)
    assert lowered.columns % tile == 0 and lowered.high % tile == 0
    assert digits.abs().max() <= most if digits.numel() else True
    assert lowered.digits.abs().max() <= most
    assert torch.equal(accumulate(digits, lowered), oracle)
    if scheme == "unary":
        assert lowered.high == 0


def test_four_bit_layers_need_no_further_columns_on_eight_bit_multipliers():
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(generator, 5, 96, 4, weight_pieces=2, most_pieces=16)
    assert weight.source.numel()
    assert lower(weight, 8).columns == 96
    assert lower(weight, 4).columns > weight.columns


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 3, 4, 7, 8, 9, 64])
def test_digits_survive_packing(bits: int, columns: int):
    most = largest_digit(bits)
    digits = torch.randint(-most, most + 1, (5, columns), dtype=torch.int8)
    words = pack_digits(digits, bits)
    assert words.shape == (1, 5, math.ceil(columns * bits / 32)) and words.dtype == torch.int32
    assert torch.equal(unpack_digits(words, bits, columns), digits)
    # Column c is at bits (c mod (32/bits)) * bits of word c div (32/bits).
    per_word = 32 // bits
    for c in range(columns):
        field = (words[0, :, c // per_word].long() >> (c % per_word * bits)) & (2**bits - 1)
        signed = torch.where(field >= 2 ** (bits - 1), field - 2**bits, field)
        assert torch.equal(signed, digits[:, c].long())


@given(seed=st.integers(0, 2**31), bits=st.sampled_from([4, 8]), pieces=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_wide_weights_survive_packing(seed: int, bits: int, pieces: int):
    generator = torch.Generator().manual_seed(seed)
    most = largest_digit(bits) * pieces
    wide = torch.randint(-most, most + 1, (7, 33), generator=generator)
    weight = FlatWeight.pack(wide, torch.ones(7), torch.full((33,), 7), bits)
    assert torch.equal(weight.wide().long(), wide)
    assert weight.digit_columns().abs().max() <= largest_digit(bits)
    assert torch.equal(weight.unpack(), wide.float())


def test_sums_that_could_overflow_are_refused():
    wide = torch.full((2, 1000), 127)
    limit = torch.full((1000,), 32512)
    with pytest.raises(SchemeError, match="32-bit"):
        FlatWeight.pack(wide, torch.ones(2), limit, 8)


def test_tensors_that_do_not_fit_are_refused():
    weight = random_weight(torch.Generator().manual_seed(0), 3, 40, 4)
    with pytest.raises(CheckpointError, match="do not fit"):
        FlatWeight(weight.digits, weight.scale, weight.limit[:-1], weight.source, 4, 40)


# ---- activations


@pytest.mark.parametrize("static", [False, True])
def test_the_error_of_an_activation_is_half_a_step(static: bool):
    generator = torch.Generator().manual_seed(1)
    weight = random_weight(generator, 3, 60, 4, two_digits=True, static=static)
    x = random_input(generator, 50, weight) * 0.01
    q, step = quantize_input(x, weight.limit, weight.step)
    inside = q.abs() < weight.limit
    error = (q * step[:, None].double() - x.double()).abs()
    assert (error[inside] <= step[:, None].expand_as(error)[inside] * 0.50001).all()
    if not static:
        assert (error <= step[:, None] * 0.50001).all()  # nothing is ever clipped


def test_tokens_of_zeros_and_tokens_that_are_not_finite():
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 1.0
    for step in (None, torch.tensor([0.5])):
        q, found = quantize_input(x, torch.full((8,), 7), step)
        assert not q[:3].any() and q[3].all()
        assert found[[0, 3]].isfinite().all() and found[1:3].isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("static", [False, True])
def test_the_layer_is_its_definition_for_any_number_of_tokens(bits, tokens, static):
    generator = torch.Generator().manual_seed(tokens)
    weight = random_weight(
        generator, 21, 50, bits, weight_pieces=2, most_pieces=3, two_digits=True, static=static,
        smooth=True,
    )  # fmt: skip
    spec = FlatSpec(21, 50, weight.columns, bits, static, True, torch.device("cpu"), torch.float32)
    kernel = choose(spec).kernel
    prepared = kernel.prepare(weight, spec)
    x = random_input(generator, tokens, weight)
    bias = torch.randn(21, generator=generator)
    y = kernel.linear(x.view(1, tokens, 50), prepared, bias, spec)
    assert y.shape == (1, tokens, 21) and y.dtype == torch.float32
    q, step = quantize_input(x, weight.limit, weight.step, weight.smooth)
    exact = (q.double() @ weight.wide().double().T) * step[:, None].double() * weight.scale + bias
    torch.testing.assert_close(y[0].double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernel.restore(prepared, spec), weight.digits)
    # What one token gives does not depend on the others.
    for row in range(min(tokens, 3)):
        alone = kernel.linear(x[row : row + 1], prepared, bias, spec)
        assert torch.equal(alone[0], y[0, row])


# ---- thresholds


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    scheme=st.sampled_from(["digits", "unary"]),
    growth=st.sampled_from([0.0, 0.03, 0.0625, 0.25, 1.0]),
    tile=st.sampled_from([1, 32, 64]),
    in_features=st.integers(1, 300),
    by_weight=st.booleans(),
)
def test_thresholds_are_the_smallest_that_the_budget_pays_for(
    seed, bits, scheme, growth, tile, in_features, by_weight
):
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(in_features, generator=generator) * torch.exp(
        2 * torch.randn(in_features, generator=generator)
    )
    absmax[torch.rand(in_features, generator=generator) < 0.1] = 0
    pieces = None
    if by_weight:
        pieces = 1 + (torch.rand(in_features, generator=generator) < 0.02).long()
    budget = flatten.column_budget(in_features, growth, tile)
    assert budget % tile == 0 and budget >= in_features
    found = flatten.flatten(absmax, bits, budget, scheme, pieces)
    if found is None:
        assert pieces is not None and int(pieces.sum()) > budget
        return
    assert found.columns <= budget
    if not absmax.any():
        assert found.threshold == 0
        return
    most = largest_digit(bits)
    # Every channel fits its range at this step.
    assert (
        absmax.double() <= found.limit_I.double() * (found.threshold / most) * (1 + 1e-12)
    ).all()
    # The next smaller threshold costs too much.
    smaller = math.nextafter(found.threshold, 0)
    cost = flatten.columns(flatten.pieces(absmax, smaller), bits, scheme)
    assert int((cost * (1 if pieces is None else pieces)).sum()) > budget
    # More columns never make the step larger.
    more = flatten.flatten(absmax, bits, budget + tile, scheme, pieces)
    assert more is not None and more.threshold <= found.threshold


def test_one_enormous_channel_costs_one_column():
    absmax = torch.ones(64)
    absmax[17] = 200.0
    found = flatten.flatten(absmax, 8, 65)
    assert found is not None and found.threshold == 1.0 and found.limit_I[17] == 32512
    assert found.columns == 65
    plain = flatten.flatten(absmax, 8, 64)
    assert plain is not None and plain.threshold == 200.0


def test_smoothing_leaves_dead_channels_alone():
    absmax = torch.tensor([0.0, 4.0, 1.0, 2.0])
    weights = torch.tensor([1.0, 1.0, 0.0, 0.5])
    scale = smoothing_scale(absmax, weights, 0.5)
    assert scale[0] == 1 and scale[2] == 1 and scale.isfinite().all() and (scale > 0).all()
    # alpha = 0.5 makes both sides of a channel equal, up to one factor for all of them.
    ratio = (absmax / scale) / (weights * scale)
    torch.testing.assert_close(ratio[1], ratio[3])
    assert torch.equal(smoothing_scale(torch.zeros(4), weights, 0.5), torch.ones(4))


def test_the_format_page_is_enough_to_read_and_run_a_layer():
    """docs/FORMAT.md, `flat`, followed literally with numpy."""
    import numpy as np

    generator = torch.Generator().manual_seed(3)
    weight = random_weight(
        generator, 6, 45, 4, weight_pieces=2, most_pieces=3, two_digits=True, smooth=True
    )
    stored = {name: tensor.numpy() for name, tensor in weight.tensors().items()}
    b, out, inputs = 4, 6, 45
    columns = inputs + len(stored["input_source"])
    words = stored["weight"][0].view(np.uint32)
    digit = np.zeros((out, columns), np.int64)
    for c in range(columns):
        field = (words[:, c // (32 // b)] >> np.uint32(c % (32 // b) * b)) & np.uint32(2**b - 1)
        digit[:, c] = np.where(field >= 2 ** (b - 1), field.astype(np.int64) - 2**b, field)
    wide = digit[:, :inputs].copy()
    for e, i in enumerate(stored["input_source"]):
        wide[:, i] += digit[:, inputs + e]
    x = random_input(generator, 9, weight)
    seen = x.numpy() / stored["input_smooth"]
    limit = stored["input_limit"].astype(np.float32)
    step = np.maximum((np.abs(seen) / limit).max(1), np.float32(2.0**-126))
    q = np.clip(np.rint(seen / step[:, None]), -limit, limit).astype(np.int64)
    y = (q @ wide.T).astype(np.float32) * (step[:, None] * stored["weight_scale"])
    spec = FlatSpec(
        out, inputs, weight.columns, b, False, True, torch.device("cpu"), torch.float32
    )  # fmt: skip
    kernel = choose(spec).kernel
    ours = kernel.linear(x, kernel.prepare(weight, spec), None, spec)
    torch.testing.assert_close(ours, torch.from_numpy(y), rtol=1e-6, atol=1e-6)
