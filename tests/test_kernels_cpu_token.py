"""What lies between linear layers, on the CPU: against the same formulas in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from lutra.kernels.cpu import token_step
from lutra.kernels.cuda.token_step import AttentionShape, _attention_by_torch

_native = pytest.importorskip(
    "lutra.kernels.cpu._native", reason="the CPU extension was not built here"
)
ERROR = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
DTYPES = pytest.mark.parametrize("dtype", list(ERROR))


@pytest.fixture(autouse=True, params=[_native.levels()[0], "portable"])
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _native.level()
    _native.set_level(request.param)
    torch.manual_seed(0)
    yield
    _native.set_level(before)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@DTYPES
def test_norm(dtype: torch.dtype) -> None:
    for rows, features, summed in itertools.product((1, 3), (8, 40, 4096), (False, True)):
        x, delta = (torch.randn(rows, features).to(dtype) for _ in range(2))
        weight = torch.rand(features).to(dtype) + 0.5
        h, y = token_step.add_norm(x, delta if summed else None, weight, 1e-5)
        assert torch.equal(h, x + delta if summed else x)
        wide = h.double()
        exact = weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        assert relative(y, exact) < ERROR[dtype]


@DTYPES
def test_gated_activation(dtype: torch.dtype) -> None:
    for rows, features in ((1, 8), (3, 24), (2, 4096)):
        x = (torch.randn(rows, 2 * features) * 4).to(dtype)
        x[0, :4] = torch.tensor([100.0, -100.0, 0.0, -87.5])
        gate, up = x.double().chunk(2, -1)
        y = token_step.silu(x)
        assert relative(y, torch.nn.functional.silu(gate) * up) < ERROR[dtype]
        x[-1, 3] = float("nan")
        assert token_step.silu(x)[-1].isnan().nonzero().flatten().tolist() == [3]


@DTYPES
def test_attention(dtype: torch.dtype) -> None:
    cases = itertools.product((1, 2), ((4, 4), (8, 2), (6, 1)), (16, 64), (0, 6, 99), (False, True))
    for batch, (heads, kv_heads), dim, position, embeds in cases:
        capacity = 100
        shape = AttentionShape(heads, kv_heads, dim, dim**-0.5, 1e-6)
        qkv = torch.randn(batch, (heads + 2 * kv_heads) * dim).to(dtype)
        keys, values = (torch.randn(batch, kv_heads, capacity, dim).to(dtype) for _ in range(2))
        rotary = norms = None
        if embeds:
            angle = torch.rand(batch, dim // 2).repeat(1, 2) * 6
            rotary = (angle.cos().to(dtype), angle.sin().to(dtype))
            norms = ((torch.rand(dim) + 0.5).to(dtype), (torch.rand(dim) + 0.5).to(dtype))
        start = torch.arange(batch, dtype=torch.int32) * min(position, 3)
        where = torch.tensor([position])
        wide = [t.double() for t in (qkv, keys, values)]
        wide_rotary = tuple(t.double() for t in rotary) if rotary else None
        wide_norms = tuple(t.double() for t in norms) if norms else None
        exact = _attention_by_torch(*wide, where, start, shape, wide_rotary, wide_norms)
        y = token_step.attention(
            qkv, keys, values, where, start, heads, shape.scale, shape.epsilon, rotary, norms
        )
        assert relative(y, exact) < ERROR[dtype]
        assert relative(keys, wide[1]) < ERROR[dtype]
        assert torch.equal(values.double(), wide[2])


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    qkv, cache = torch.randn(1, 48 * 64), torch.randn(2, 1, 8, 3000, 64)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            keys, values = cache.clone()
            where, start = torch.tensor([2990]), torch.zeros(1, dtype=torch.int32)
            results.append(
                token_step.attention(qkv, keys, values, where, start, 32, 0.1, 0.0, None, None)
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_what_is_not_served_is_left_to_torch() -> None:
    x = torch.randn(2, 16)
    weight = torch.ones(16)
    assert token_step.add_norm(x, None, weight, 1e-5) is not None
    assert token_step.add_norm(x[:, :12], None, weight[:12], 1e-5) is None
    assert token_step.add_norm(x.double(), None, weight.double(), 1e-5) is None
    assert token_step.add_norm(x, None, weight.bfloat16(), 1e-5) is None
    assert token_step.add_norm(x, x[:1], weight, 1e-5) is None
    assert token_step.add_norm(x.T.contiguous().T, None, weight, 1e-5) is None
    assert token_step.add_norm(x.clone().requires_grad_(), None, weight, 1e-5) is None
    assert token_step.silu(x.half()) is None and token_step.silu(x[:, :8]) is None


def test_wrong_positions_are_refused() -> None:
    qkv, cache = torch.randn(1, 3 * 16), torch.zeros(2, 1, 1, 10, 16)
    for position, start in ((10, 0), (-1, 0), (3, 4), (3, -1)):
        with pytest.raises(ValueError):
            token_step.attention(
                qkv, cache[0], cache[1], torch.tensor([position]),
                torch.tensor([start], dtype=torch.int32), 1, 1.0, 0.0, None, None,
            )
