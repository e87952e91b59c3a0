"""What runs between the linear layers of a token: compiled without a GPU, checked on one."""

from __future__ import annotations

import pytest
import torch

from lutra.kernels.cuda import token_step
from lutra.kernels.cuda.token_step import AttentionShape, DirectSum

_VARIANTS = [
    ("token_norm", {"THREADS": 512, "VECTORS": 1, "LAYER_NORM": 0, "CLUSTER": 1}),
    ("token_norm", {"THREADS": 512, "VECTORS": 3, "LAYER_NORM": 1, "CLUSTER": 1}),
    ("token_norm", {"THREADS": 192, "VECTORS": 1, "LAYER_NORM": 1, "CLUSTER": 8}),
    ("token_activation", {"SILU": 1, "THREADS": 128, "ROWS": 4}),
    ("token_activation", {"SILU": 0, "THREADS": 64, "ROWS": 1}),
    ("token_sum", {}),
    ("prompt_heads", {"HEAD_DIM": 128, "ROTARY": 1, "HEAD_NORM": 0}),
    ("prompt_heads", {"HEAD_DIM": 64, "ROTARY": 1, "HEAD_NORM": 1}),
    *(
        (
            "token_attention",
            {"HEAD_DIM": d, "QUERIES": q, "WARPS": w, "ROTARY": r, "HEAD_NORM": n},
        )
        for d, q, w, r, n in (
            (128, 1, 6, 0, 0), (128, 4, 8, 1, 0), (128, 4, 6, 1, 0), (64, 7, 4, 1, 0),
            (128, 8, 4, 1, 1), (256, 8, 4, 1, 1), (128, 16, 4, 1, 0),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a", "sm_120a"])
@pytest.mark.parametrize(("name", "own"), _VARIANTS, ids=lambda v: v if isinstance(v, str) else "")
def test_kernels_compile_without_spills(name, own, arch):
    pytest.importorskip("cuda.bindings")
    from lutra.errors import KernelError
    from lutra.kernels.cuda import nvrtc

    try:
        nvrtc.version()
    except KernelError as error:
        pytest.skip(str(error))
    defines = token_step.defines(torch.bfloat16, **own)
    options = [f"--gpu-architecture={arch}", *nvrtc.COMMON_OPTIONS, "--ptxas-options=-v"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    cubin, log = nvrtc.compile_uncached(nvrtc.source(name), options, f"{name}.cu")
    assert len(cubin) > 1000
    assert "0 bytes spill stores" in log


def test_what_the_kernels_can_not_run_is_said():
    shape = AttentionShape(32, 8, 128, 1.0)
    gpu = torch.device("cuda", 0)
    assert token_step.unsupported(shape, 4096, torch.bfloat16, gpu) is None
    assert token_step.unsupported(AttentionShape(3, 1, 80, 1.0), 240, torch.float32, gpu)
    for other, words in (
        ((shape, 4096, torch.float32), "float32"),
        ((AttentionShape(8, 8, 80, 1.0), 640, torch.float16), "80 channels"),
        ((AttentionShape(71, 1, 64, 1.0), 4544, torch.float16), "71 heads"),
        ((shape, 4100, torch.float16), "4100 features"),
    ):
        refusal = token_step.unsupported(*other, gpu)
        assert refusal is not None and words in refusal
        assert token_step.unsupported(*other, torch.device("cpu")) is None


def test_attention_is_planned_within_the_card():
    from lutra.kernels.cuda.launch import TYPICAL_CARDS

    for card in TYPICAL_CARDS.values():
        for d, queries, kv_heads in (
            (128, 4, 8), (128, 1, 96), (256, 8, 4), (64, 7, 2), (128, 16, 6),
        ):  # fmt: skip
            shape = AttentionShape(queries * kv_heads, kv_heads, d, 1.0)
            for batch in (1, 3, 16, 64):
                for capacity in (256, 300, 1024, 32768):
                    warps, parts = token_step.attention_plan(shape, batch, capacity, card)
                    assert token_step.attention_shared_bytes(shape, warps) <= 48 * 1024
                    assert parts == 1 or card.capability >= (9, 0)
                    assert (queries * d) % (8 * parts) == 0 and warps >= 4


def test_buffers_of_sums():
    assert DirectSum.bytes_for(10, 2) == 2 * 2 * 3 * 16


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 4096, 8200, 12288])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_norms(dtype, features, layer_norm, delta):
    torch.manual_seed(features)
    x, d, weight, bias = (
        torch.randn(shape, features, device="cuda", dtype=dtype).squeeze(0)
        for shape in (3, 3, 1, 1)
    )
    arguments = (x, d if delta else None, weight, bias if layer_norm else None, 1e-5, layer_norm)
    h, y = token_step.add_norm(*arguments)
    h_cpu, y_cpu = token_step.add_norm(
        *(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments)
    )
    assert torch.equal(h.cpu(), h_cpu)
    assert (y.cpu() == y_cpu).float().mean() > 0.99
    assert torch.allclose(y.cpu().float(), y_cpu.float(), rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("d", "heads", "kv_heads", "rotary", "norms"),
    [(128, 32, 8, True, False), (128, 6, 6, False, False), (64, 14, 2, True, False),
     (128, 16, 2, True, True), (256, 8, 4, True, False)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("batch", "capacity", "position"),
    [(1, 256, 0), (1, 256, 37), (3, 512, 300), (2, 2048, 1999), (16, 288, 260), (64, 288, 260)],
)
def test_attention(dtype, d, heads, kv_heads, rotary, norms, batch, capacity, position):
    torch.manual_seed(position)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    shape = AttentionShape(heads, kv_heads, d, d**-0.5, 1e-6)
    qkv = random(batch, (heads + 2 * kv_heads) * d)
    keys, values = (random(batch, kv_heads, capacity, d) for _ in range(2))
    at = torch.tensor([position], device="cuda")
    start = torch.tensor([min(5 * i, position) for i in range(batch)], dtype=torch.int32).cuda()
    angle = torch.rand(batch, d // 2, device="cuda") * 6
    tables = tuple(torch.cat([f] * 2, -1).to(dtype) for f in (angle.cos(), angle.sin()))
    weights = (random(d).abs() + 0.5, random(d).abs() + 0.5)
    rest = (shape, tables if rotary else None, weights if norms else None)
    keys_too, values_too = keys.clone(), values.clone()
    torch.cuda.synchronize()
    first = token_step.attention(qkv, keys, values, at, start, *rest)
    again = token_step.attention(qkv, keys, values, at, start, *rest)
    exact = token_step._attention_by_torch(
        qkv, keys_too, values_too, at, start, shape, rest[1], rest[2]
    )
    assert torch.equal(first, again)
    assert torch.equal(keys, keys_too) and torch.equal(values, values_too)
    assert (first - exact).abs().max() <= 0.01 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("d", "heads", "kv_heads", "rotary", "norms"),
    [(128, 32, 8, True, False), (128, 6, 6, False, False), (64, 14, 2, True, True),
     (256, 8, 4, True, False)],
)  # fmt: skip
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 33), (1, 700)])
def test_attention_of_prompts(dtype, d, heads, kv_heads, rotary, norms, batch, length):
    torch.manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    shape = AttentionShape(heads, kv_heads, d, d**-0.5, 1e-6)
    qkv = random(batch * length, (heads + 2 * kv_heads) * d)
    angle = torch.rand(batch * length, d // 2, device="cuda") * 6
    tables = tuple(torch.cat([f] * 2, -1).to(dtype) for f in (angle.cos(), angle.sin()))
    weights = (random(d).abs() + 0.5, random(d).abs() + 0.5)
    rest = (tables if rotary else None, weights if norms else None)
    keys, values = torch.zeros(2, batch, kv_heads, length + 3, d, device="cuda", dtype=dtype)
    wanted_qkv = token_step._turned_heads(qkv.clone(), shape, *rest)
    y = token_step.prompt_attention(qkv.clone(), keys, values, shape, *rest)
    q, k, v = (t.view(batch, length, -1, d).transpose(1, 2) for t in wanted_qkv)
    if norms:  # sums of another order may round a channel of a normed key to its neighbour
        normed = token_step._turned_heads(qkv.clone(), shape, None, weights)[1].float()
        pair = (normed.abs() + token_step._turned(normed).abs()).view(batch, length, -1, d)
        # A turned channel is a sum of two, each off by a rounding, that may cancel.
        bound = 2 * torch.finfo(dtype).eps * pair.transpose(1, 2)
        assert ((keys[:, :, :length].float() - k.float()).abs() <= bound).all()
    else:
        assert torch.equal(keys[:, :, :length], k)
    assert torch.equal(values[:, :, :length], v)
    assert (keys[:, :, length:] == 0).all() and (values[:, :, length:] == 0).all()
    exact = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True, scale=shape.scale, enable_gqa=True
    )
    exact = exact.transpose(1, 2).reshape(batch * length, -1)
    assert (y - exact).norm() <= 6e-3 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 70])
def test_activations(dtype, rows):
    x = torch.randn(rows, 2832, device="cuda", dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate) * up
    assert (token_step.activation(x, gated=True) == silu).float().mean() > 0.99
    assert torch.equal(token_step.activation(x, gated=False), torch.relu(x))
