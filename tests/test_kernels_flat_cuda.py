"""What of the flat CUDA kernels can be checked without a GPU: layouts, tables, plans, compiling."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutra.errors import KernelError
from lutra.formats.flat import FlatWeight, largest_digit
from lutra.kernels.cuda import flat_products as products
from lutra.kernels.cuda import nvrtc
from lutra.kernels.cuda.flat_layout import (
    Multiplier,
    from_register_order,
    lower_rows,
    multiplier_of,
    pack_pairs,
    prepare,
    restore,
    to_register_order,
    unpack_pairs,
)
from lutra.kernels.cuda.launch import TYPICAL_CARDS as CARDS
from lutra.kernels.flat.lowering import (
    HIGH,
    LOW,
    accumulate,
    activation_digits,
    quantize_input,
)
from lutra.kernels.flat.reference import wide_product

HOPPER = CARDS["sm_90a"]


def random_layer(out: int, inputs: int, bits: int, static: bool, seed: int) -> FlatWeight:
    generator = torch.Generator().manual_seed(seed)
    most = largest_digit(bits)
    widths = torch.tensor([1, 1, 1, 1, 1, 1, 2, 5, 2 * most + 2])
    limit = most * widths[torch.randint(0, len(widths), (inputs,), generator=generator)]
    pieces = torch.randint(1, 3, (inputs,), generator=generator)
    wide = ((torch.rand(out, inputs, generator=generator) * 2 - 1) * most * pieces).round().long()
    step = torch.tensor([0.01]) if static else None
    return FlatWeight.pack(wide, torch.rand(out, generator=generator), limit, bits, step)


def test_nibbles_and_registers_round_trip() -> None:
    digits = torch.randint(-8, 8, (192, 384), dtype=torch.int8)
    packed = to_register_order(digits)
    assert packed.numel() * 2 == digits.numel()
    assert torch.equal(from_register_order(packed), digits)
    assert torch.equal(unpack_pairs(pack_pairs(digits)), digits)


def test_register_order_is_that_of_the_tensor_cores() -> None:
    """Lane 4 g + t of warp w holds rows 16 w + g, + 8 and inputs 4 t .. 4 t + 3 of each 16."""
    digits = torch.randint(-8, 8, (128, 256), dtype=torch.int8)
    packed = to_register_order(digits).view(torch.int8)
    for _ in range(200):
        block, tile, half, thread, word, byte = (
            int(torch.randint(0, n, ())) for n in packed.shape
        )
        warp, g, t = thread // 32, thread % 32 // 4, thread % 4
        column = 128 * tile + 64 * half + 32 * (word // 2) + 16 * (word % 2) + 4 * t + byte
        row = 64 * block + 16 * warp + g
        value = int(packed[block, tile, half, thread, word, byte])
        assert ((value & 15) ^ 8) - 8 == digits[row, column]
        assert value >> 4 == digits[row + 8, column]


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 200), inputs=st.integers(1, 300), bits=st.sampled_from([4, 8]),
    digit_bits=st.sampled_from([4, 8]), registers=st.booleans(), static=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_tables_say_what_the_lowering_says(
    out: int, inputs: int, bits: int, digit_bits: int, registers: bool, static: bool, seed: int
) -> None:
    """The sweep, the entries and the accumulators of the kernels, acted out in torch."""
    if bits > digit_bits:
        return
    layer = random_layer(out, inputs, bits, static, seed)
    use_registers = registers and bits == 4 and digit_bits == 8
    prepared = prepare(layer, Multiplier(digit_bits, use_registers))
    assert torch.equal(restore(prepared, out, layer.columns, bits), layer.digits)
    assert prepared.columns % 128 == 0 and prepared.high % (256 // digit_bits) == 0
    assert prepared.scale.numel() % 128 == 0

    lowered = lower_rows(layer, 0, out, digit_bits)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(seed)) * layer.limit / 50
    wide, step = quantize_input(x, layer.limit, layer.step)
    if not static:
        ratio = x.abs()
        for channel, limit in prepared.wide.tolist():
            ratio[:, channel] = x[:, channel].abs() / limit * prepared.limit
        assert torch.allclose(ratio.amax(1) / prepared.limit, step, rtol=1e-6)
    most = largest_digit(digit_bits)
    q = torch.full((5, prepared.columns), 99)
    swept = (x / step[:, None]).round().clamp(-prepared.clamp, prepared.clamp)
    q[:, prepared.high : prepared.high + inputs] = swept.long()
    columns = [entry[0] for entry in prepared.entries.tolist()]
    assert columns == sorted(set(columns))
    for column, channel, piece, limit in prepared.entries.tolist():
        value = wide[:, channel].long()
        assert limit == layer.limit[channel]
        high = (value + most).div(2 * most + 1, rounding_mode="floor")
        if piece == LOW:
            q[:, column] = value - (2 * most + 1) * high
        else:
            whole, j = (value, piece) if piece >= 0 else (high, HIGH - piece)
            upper, lower_ = (j + 1) * most, j * most
            q[:, column] = whole.clamp(-upper, upper) - whole.clamp(-lower_, lower_)
    filled = lowered.origin >= 0
    expected = activation_digits(wide, lowered).long()
    assert torch.equal(q[:, filled], expected[:, filled])
    assert torch.equal(accumulate(expected, lowered), wide_product(wide, layer.wide()))


def jobs(capability: tuple[int, int]) -> Iterator[products.Job]:
    for bits in (4, 8):
        way = multiplier_of(capability, bits)
        for high in (0, 64):
            for tokens in (1, 16, 32, 64, 70, 300, 4096):
                for rows, columns in ((4096, 4096), (14336, 4096 + 2 * high), (64, 128 + 2 * high)):
                    yield products.Job(
                        rows, tokens, columns, way.registers, way.digit_bits, high, tokens % 2 == 0
                    )


@pytest.mark.parametrize("arch", CARDS)
def test_plans_fit_the_card(arch: str) -> None:
    card = CARDS[arch]
    for job in jobs(card.capability):
        plan, reason = products.choose(job, card)
        name, defines, shared = products.instance(plan, job)
        assert shared + 512 <= card.shared_bytes and reason and name == plan.kernel
        assert plan.stages >= 3
        if isinstance(plan, products.FewPlan):
            assert 1 <= plan.split <= min(8, job.k_tiles)
            assert shared >= plan.tokens * (defines["WARPGROUPS"] * 64 + 4) * 4 + 1024
    for inputs in (1, 8, 4096, 12288, 16384, 40000, 49152, 200000):
        for tokens, kind in itertools.product((1, 64, 65, 1024, 4096), (0, 1, 4)):
            plan_q = products.quantize_plan(inputs, tokens, kind)
            assert plan_q.threads % 32 == 0 and plan_q.threads <= 1024
            assert plan_q.vectors == 0 or plan_q.threads * plan_q.vectors * 8 >= inputs
            assert plan_q.vectors <= products.MOST_VECTORS


ALL = os.environ.get("LUTRA_COMPILE_ALL") == "1"


def instances(arch: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Those that take most registers; with ``LUTRA_COMPILE_ALL=1`` all that a card can run."""
    card = CARDS[arch]
    most_used = arch in ("sm_80", "sm_90a")
    tokens_of = (1, 64, 4096) if most_used else (4096,)
    for job in jobs(card.capability):
        if not ALL and (job.high == 0 or job.tokens not in tokens_of):
            continue
        plans: list[products.Plan] = [products.choose(job, card)[0]]
        if isinstance(plans[0], products.LinearPlan):
            plans = list(products.linear_plans(job, card))
        for plan in plans:
            name, defines, _ = products.instance(plan, job)
            yield name, defines | {"Y_BF16": 1}
    widths = (8, 4) if card.capability[0] == 8 else (8,)
    for dtype, width in itertools.product(
        (torch.bfloat16, torch.float16) if ALL else (torch.bfloat16,), widths
    ):
        sizes = ((4096, 4096), (14336, 100), (4096, 1), (28672, 4096), (49152, 100), (60000, 1))
        for inputs, tokens in sizes if ALL else sizes[: 2 if most_used else 1]:
            for smooth in (False, True) if ALL else (False,):
                kinds = [(0, 0), (1, 0), *itertools.product((3, 4), range(4)), (2, 0)]
                for kind in kinds if ALL else [kinds[0], kinds[-1], kinds[6]]:
                    plan_q = products.quantize_plan(inputs, tokens, kind[0])
                    if kind[0] == 0 or products.can_come_before(inputs):
                        yield products.quantize_instance(
                            plan_q, inputs, dtype, width, smooth, True, kind
                        )


@pytest.mark.parametrize("arch", CARDS)
def test_every_instance_compiles_without_spills(arch: str) -> None:
    try:
        version = nvrtc.version()
    except KernelError as error:
        pytest.skip(str(error))
    if int(re.sub(r"\D", "", arch)) not in nvrtc.supported_archs():
        pytest.skip(f"NVRTC {version} does not know {arch}")
    for name, settings_ in {(n, tuple(sorted(d.items()))) for n, d in instances(arch)}:
        options = [f"--gpu-architecture={arch}", *nvrtc.COMMON_OPTIONS, "--ptxas-options=-v"]
        options += [f"-D{key}={value}" for key, value in settings_]
        cubin, log = nvrtc.compile_uncached(nvrtc.source(name), options, f"{name}.cu")
        assert cubin[:4] == b"\x7fELF"
        stores = re.findall(r"(\d+) bytes spill stores", log)
        # Quantizing holds a whole token: a few registers beside its loop cost nothing.
        allowed = 128 if name == "flat_quantize" else 0
        assert stores and max(map(int, stores)) <= allowed, f"{name} {settings_}: {log[-400:]}"
        # What ptxas says when it puts one tensor-core product after the other.
        assert "serialized" not in log and "warning" not in log.lower(), log


def _rounded(value: Fraction) -> Fraction:
    """The nearest float32, ties to even, of a number in its normal range."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


@pytest.mark.parametrize("bits", [8, 11])
def test_one_correction_rounds_to_the_integer_of_the_division(bits: int) -> None:
    """What `flat_quantize.cu` says of its quotients: every mantissa, every place of rounding.

    The corrected quotient is the exact one but for 2^-45, so it can round to another integer only
    if the exact one lies that near to the middle between a half and a neighbour of it in float32.
    """
    tried = 0
    for k in range(0, 127, 1 if bits == 8 else 9):
        half = 2 * k + 1  # twice the quotient at which rounding turns
        width = half.bit_length()
        middles = [(half << (25 - width)) + s for s in (-1, 0, 1)]
        if half == 1 << (width - 1):  # neighbours below a power of two are twice as near
            middles[0] = (half << (26 - width)) - 1
        for middle in middles:
            for x in range(1 << (bits - 1), 1 << bits):
                shift = 23 + middle.bit_length() - x.bit_length()
                for product in (x << shift, x << (shift + 1)):
                    nearest = (2 * product + middle) // (2 * middle)
                    for step in (nearest - 1, nearest, nearest + 1):
                        near = abs(step * middle - product) << 43 <= product
                        if not near or not 1 << 23 <= step < 1 << 24:
                            continue
                        divisor = step * _power_of_two(x, step, half)
                        exact = x / divisor
                        inverse = _rounded(1 / divisor)
                        first = _rounded(x * inverse)
                        rest = _rounded(x - first * divisor)
                        corrected = _rounded(first + rest * inverse)
                        assert round(corrected) == round(_rounded(exact)), (k, x, step)
                        tried += 1
    assert tried > 100


def _power_of_two(x: int, step: int, half: int) -> Fraction:
    """By what a step is scaled for the quotient to lie at ``half / 2``."""
    wanted, found = Fraction(half, 2), Fraction(x, step)
    scale = Fraction(1)
    while found / scale > wanted * Fraction(3, 2):
        scale *= 2
    while found / scale < wanted * Fraction(3, 4):
        scale /= 2
    return scale
