"""Methods on blocks of plain tensors: every method, format, width and odd shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lutra.architectures import Architecture, architecture_of
from lutra.errors import SchemeError
from lutra.formats.bitplanes import BitPlanes
from lutra.formats.grouped import Grouped
from lutra.methods import Block, BlockRunner, InputStatistics, Result, get_method, methods
from lutra.nn import QuantizedLinear
from lutra.scheme import Format
from lutra.solvers.gptq_loop import output_error

# Methods that choose for the whole model have tests of their own.
BY_BLOCK = {name: method for name, method in methods().items() if method.scope != "model"}
CASES = [(name, kind) for name, method in BY_BLOCK.items() for kind in method.formats]
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2
}  # fmt: skip


def _arch(**changes: Any) -> Architecture:
    """A family with nothing to fold, for blocks of single layers."""
    return replace(architecture_of(LLAMA), **{"folds": (), **changes})


def _statistics(x_NI: Tensor) -> InputStatistics:
    shift = torch.zeros(x_NI.shape[1], x_NI.shape[1])
    return InputStatistics(x_NI.T @ x_NI / len(x_NI), x_NI.abs().mean(0), len(x_NI), shift)


def _block(weight_OI: Tensor, format: Format, x_NI: Tensor | None = None) -> Block:
    if x_NI is None:
        generator = torch.Generator().manual_seed(1)
        x_NI = torch.randn(4 * weight_OI.shape[1], weight_OI.shape[1], generator=generator)
        x_NI = x_NI * torch.randn(weight_OI.shape[1], generator=generator).mul(0.5).exp()
    inputs = {"a": _statistics(x_NI)}
    return Block("block", {"a": weight_OI}, {"a": format}, inputs, {}, _arch())


def _run(name: str, block: Block, **options: Any) -> Result:
    method = get_method(name)
    return method.quantize(block, method.parse_options(options))


def _dense(result: Result, path: str = "a") -> Tensor:
    return result.weights[path].unpack()


def _bench(seed: int, out: int = 64, inputs: int = 512) -> tuple[Tensor, Tensor]:
    """Weights and activations with the tails and correlations of a trained layer."""
    torch.manual_seed(seed)
    weight = 0.02 * torch.distributions.StudentT(5.0).sample((out, inputs))
    weight = weight * torch.randn(out, 1).mul(0.3).exp() * torch.randn(inputs).mul(0.2).exp()
    x = torch.randn(2048, inputs) + torch.randn(2048, 64) @ torch.randn(64, inputs) / 2
    x = x * torch.randn(inputs).mul(0.8).exp()
    x[:, torch.randperm(inputs)[:5]] *= 15
    return weight, x


# ---- how good


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_the_methods_on_a_layer(seed):
    """RTN is worst, clipping by diag(H) better, error feedback better, descent best."""
    weight, x = _bench(seed)
    hessian = x.T @ x / len(x)
    error: dict[tuple[str, int], float] = {}
    for bits in (2, 3, 4):
        block = _block(weight, Format("ubcq", bits, 128), x)
        for name in ("rtn", "awq", "gptq", "lut-gemm"):
            error[name, bits] = output_error(weight, _dense(_run(name, block)), hessian)
        free = replace(block, formats={"a": Format("bcq", bits, 128)})
        error["bcq", bits] = output_error(weight, _dense(_run("lut-gemm", free)), hessian)
        assert error["awq", bits] < 0.8 * error["rtn", bits]
        assert error["gptq", bits] < 0.45 * error["rtn", bits]
        assert error["lut-gemm", bits] < 0.6 * error["gptq", bits]
        assert error["bcq", bits] < error["lut-gemm", bits]
    for name in ("rtn", "gptq", "lut-gemm", "bcq"):
        assert error[name, 4] < error[name, 3] < error[name, 2]


def test_free_levels_beat_uniform_ones_without_data():
    weight, _ = _bench(0)
    for bits in (2, 3, 4):
        losses = {}
        for solver in ("greedy", "refined", "alternating"):
            block = _block(weight, Format("bcq", bits, 128))
            dense = _dense(_run("lut-gemm", block, calibrated=False, solver=solver))
            losses[solver] = float((weight - dense).square().sum())
        rounded = _dense(_run("rtn", _block(weight, Format("ubcq", bits, 128))))
        assert losses["alternating"] <= losses["refined"] <= losses["greedy"]
        assert losses["alternating"] < 0.8 * float((weight - rounded).square().sum())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_eight_bits_do_no_harm(name, kind):
    weight, x = _bench(3, 24, 160)
    result = _run(name, _block(weight, Format(kind, 8, 64), x))
    assert output_error(weight, _dense(result), x.T @ x) < 1e-4
    assert float((weight - _dense(result)).norm() / weight.norm()) < 0.02


# ---- every shape


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("out", "inputs", "group"),
    [(7, 33, 32), (1, 96, 32), (5, 70, 64), (3, 20, 128), (9, 100, -1)],
)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_odd_shapes(name, kind, out, inputs, group, bits):
    torch.manual_seed(out)
    weight = 0.1 * torch.randn(out, inputs)
    format = Format(kind, bits, group)
    packed = _run(name, _block(weight, format)).weights["a"]
    assert isinstance(packed, Grouped if kind == "int" else BitPlanes)
    assert packed.bits == bits and packed.unpack().shape == weight.shape
    assert packed.group_size == format.group_size_for(inputs)
    error = float((weight - packed.unpack()).square().mean() / weight.square().mean())
    assert error < {1: 1.0, 2: 0.8, 3: 0.3, 5: 0.05}[bits]
    layer = QuantizedLinear.from_weight(packed, format)
    x = torch.randn(3, inputs)
    assert torch.allclose(layer(x), x @ packed.unpack().T, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_unusual_weights(name, kind):
    """All-zero rows, constant groups, one enormous weight and dead inputs are all sound."""
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(8, 96)
    weight[1] = 0
    weight[2, 32:64] = -0.25
    weight[3] = 0.5 + torch.rand(96)  # a grid that does not reach zero by itself
    weight[4, 7] = 1e6
    x = torch.randn(256, 96)
    x[:, 40:50] = 0
    packed = _run(name, _block(weight, Format(kind, 4, 32), x)).weights["a"]
    dense = packed.unpack()
    assert dense.isfinite().all()
    assert packed.scale.dtype == torch.float32  # float16 ends at 65504
    assert dense[1].abs().max() < 1e-6
    assert torch.allclose(dense[2, 32:40], weight[2, 32:40], atol=0.06)
    assert float((dense[3] - weight[3]).abs().max()) < 0.35
    assert abs(float(dense[4, 7]) / 1e6 - 1) < 0.05
    rest = dense[[0, 5, 6, 7]] - weight[[0, 5, 6, 7]]
    assert float(rest.norm() / weight[[0, 5, 6, 7]].norm()) < 0.25  # other rows do not suffer


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("factor", [1e-7, 1e4])
def test_scale_of_the_weights_does_not_matter(name, kind, factor):
    """Scales that float16 can not hold are stored in float32."""
    torch.manual_seed(0)
    weight = torch.randn(4, 64)
    errors = []
    for w in (weight, weight * factor):
        dense = _dense(_run(name, _block(w, Format(kind, 4, 32))))
        errors.append(float((w - dense).norm() / w.norm()))
    assert errors[1] < 1.1 * errors[0] + 1e-3


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_inputs_at_all_are_no_crash(name, kind):
    """A layer that calibration never reached has H = 0."""
    weight = torch.randn(4, 64)
    packed = _run(name, _block(weight, Format(kind, 4, 32), torch.zeros(16, 64)))
    assert float((weight - _dense(packed)).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_same_call_gives_the_same_bits(name, kind):
    weight, x = _bench(5, 12, 96)
    first, second = (
        _run(name, _block(weight.clone(), Format(kind, 3, 32), x)).weights["a"] for _ in range(2)
    )
    for one, two in zip(first.tensors().values(), second.tensors().values(), strict=True):
        assert torch.equal(one, two)


# ---- precisions that share planes


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
@pytest.mark.parametrize("serve", [(2, 3), (1,), (3,)])
def test_served_precisions(kind, calibrated, serve):
    weight, x = _bench(1, 24, 192)
    hessian = x.T @ x
    format = Format(kind, 4, 64, serve_bits=serve)
    packed = _run("lut-gemm", _block(weight, format, x), calibrated=calibrated).weights["a"]
    assert isinstance(packed, BitPlanes) and sorted(packed.served or {}) == list(serve)

    def error(planes: BitPlanes) -> float:
        dense = planes.unpack()
        if calibrated:
            return output_error(weight, dense, hessian)
        return float((weight - dense).square().sum() / weight.square().sum())

    errors = [error(packed.prefix(bits)) for bits in (*serve, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]
    for bits, found in zip(serve, errors, strict=False):
        plain = replace(packed, served=None)
        assert found <= error(plain.prefix(bits))  # their own scales are worth storing
        alone = _run(
            "lut-gemm", _block(weight, Format(kind, bits, 64), x), calibrated=calibrated
        ).weights["a"]
        assert isinstance(alone, BitPlanes)
        assert error(alone) <= found * (1 + 1e-6)
        if calibrated:  # sharing planes costs something, and less than plain rounding
            rounded = _run("rtn", _block(weight, Format("ubcq", bits, 64), x)).weights["a"]
            assert isinstance(rounded, BitPlanes)
            assert found < 0.8 * error(rounded)
    layer = QuantizedLinear.from_weight(packed, format)
    token = torch.randn(2, 192)
    for bits in (*serve, 4):
        layer.serve(bits)
        expected = token @ packed.prefix(bits).unpack().T
        assert torch.allclose(layer(token), expected, atol=1e-4 * expected.abs().max())


# ---- training on the block's output


def _runner(weight: Tensor, x: Tensor) -> BlockRunner:
    """A block that is one linear layer, on samples of 16 tokens."""
    inputs = x[: len(x) // 16 * 16].view(-1, 16, x.shape[1])

    def run(parameters: Any, samples: Tensor) -> Tensor:
        return inputs[samples] @ parameters["a.weight"].T

    def target(samples: Tensor) -> Tensor:
        return inputs[samples] @ weight.T

    return BlockRunner(len(inputs), run, target)


@pytest.mark.parametrize("kind", ["ubcq", "bcq"])
@pytest.mark.parametrize("serve", [(), (2,)])
def test_reconstruction_does_not_lose(kind, serve):
    weight, x = _bench(2, 16, 96)
    block = _block(weight, Format(kind, 3, 32, serve_bits=serve), x[:512])
    block.runner = _runner(weight, x[:512])
    result = _run("lut-gemm", block, reconstruct=True, steps=12, batch=4)
    assert result.notes["block_error"] <= result.notes["block_error_before"]
    again = _run("lut-gemm", block, reconstruct=True, steps=12, batch=4)
    for one, two in zip(
        result.weights["a"].tensors().values(), again.weights["a"].tensors().values(), strict=True
    ):
        assert torch.equal(one, two)
    for bits in (*serve, 3):
        packed = result.weights["a"]
        assert isinstance(packed, BitPlanes)
        assert output_error(weight, packed.prefix(bits).unpack(), x.T @ x) < 0.5


def test_reconstruction_of_constant_and_zero_groups():
    weight, x = _bench(2, 16, 96)
    weight[0], weight[1, :32], weight[2, 3] = 0, 0.1, 1e4
    for kind in ("ubcq", "bcq"):
        block = _block(weight, Format(kind, 2, 32), x[:512])
        block.runner = _runner(weight, x[:512])
        dense = _dense(_run("lut-gemm", block, reconstruct=True, steps=8, batch=4))
        assert dense.isfinite().all() and dense[0].abs().max() < 0.05


def test_following_the_original_with_the_same_inputs_changes_nothing():
    weight, x = _bench(4, 16, 96)
    block = _block(weight, Format("ubcq", 3, 32), x)
    plain, following = (
        _dense(_run("lut-gemm", block, follow_original=follow)) for follow in (False, True)
    )
    assert torch.equal(plain, following)


def test_following_the_original_mends_a_changed_input():
    weight, x = _bench(4, 16, 96)
    changed = x * 0.7 + 0.1 * torch.randn_like(x)
    statistics = _statistics(changed)
    statistics.shift_II = (x - changed).T @ changed / len(x)
    block = _block(weight, Format("ubcq", 6, 32))
    block.inputs = {"a": statistics}
    error = [
        float(
            (x @ weight.T - changed @ _dense(_run("lut-gemm", block, follow_original=f)).T).norm()
        )
        for f in (False, True)
    ]
    assert error[1] < 0.7 * error[0]


# ---- scaling channels


def _llama_block() -> tuple[Block, dict[str, Tensor], Callable[..., Tensor]]:
    """A gated MLP behind a norm, with the other half of a block beside it."""
    torch.manual_seed(0)
    arch = architecture_of(LLAMA)
    shapes = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }  # fmt: skip
    weights = {path: 0.1 * torch.randn(shape) for path, shape in shapes.items()}
    norms = {f"{n}.weight": torch.rand(64) + 0.5 for n in arch_norms(arch)}
    scale = {width: torch.randn(width).exp() for width in (64, 96)}
    inputs = {}
    for group in arch.groups:
        width = weights[group[0]].shape[1]
        shared = _statistics(torch.randn(512, width) * scale[width])
        inputs.update(dict.fromkeys(group, shared))
    formats = dict.fromkeys(weights, Format("ubcq", 8, 32))
    block = Block("model.layers.0", weights, formats, inputs, norms, arch)

    def mlp(x: Tensor, weights: dict[str, Tensor], norm: Tensor) -> Tensor:
        h = x * norm
        gate = torch.nn.functional.silu(h @ weights["mlp.gate_proj"].T)
        return (gate * (h @ weights["mlp.up_proj"].T)) @ weights["mlp.down_proj"].T

    return block, norms, mlp


def arch_norms(arch: Architecture) -> list[str]:
    return [site.source for site in arch.folds if site.source.endswith("layernorm")]


def test_awq_changes_what_is_stored_and_not_what_is_computed():
    block, norms, mlp = _llama_block()
    x = torch.randn(9, 64)
    before = mlp(x, block.weights, norms["post_attention_layernorm.weight"])
    result = _run("awq", block)
    assert set(result.parameters) == set(norms)
    dense = {path: w.unpack() for path, w in result.weights.items()}
    after = mlp(x, dense, result.parameters["post_attention_layernorm.weight"])
    assert float((after - before).norm() / before.norm()) < 0.02
    moved = (dense["mlp.up_proj"] - block.weights["mlp.up_proj"]).norm()
    assert float(moved / block.weights["mlp.up_proj"].norm()) > 0.05
    assert any(exponent > 0 for exponent in result.notes["exponents"].values())
    assert all(error < 1e-3 for error in result.errors.values())


def test_awq_with_a_dead_channel():
    block, norms, mlp = _llama_block()
    for statistics in {id(s): s for s in block.inputs.values()}.values():
        statistics.absmean_I[5] = 0
        statistics.hessian_II[5], statistics.hessian_II[:, 5] = 0, 0
    result = _run("awq", block)
    for packed in result.weights.values():
        assert packed.unpack().isfinite().all()
    for tensor in result.parameters.values():
        assert tensor.isfinite().all()


# ---- options


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("rtn", {"clp": "search"}, "Did you mean clip"),
        ("rtn", {"clip": 3}, "takes a str"),
        ("gptq", {"damping": "much"}, "takes a float"),
        ("gptq", {"damping": True}, "takes a float"),
        ("gptq", {"damping": -0.1}, "damping"),
        ("gptq", {"damping": float("nan")}, "damping"),
        ("lut-gemm", {"damping": float("inf")}, "damping"),
        ("lut-gemm", {"rounds": 1.5}, "takes a int"),
        ("lut-gemm", {"rounds": -1}, "rounds"),
        ("lut-gemm", {"steps": -5}, "steps"),
        ("lut-gemm", {"batch": 0}, "batch"),
        ("lut-gemm", {"learning_rate": -0.1}, "learning_rate"),
        ("lut-gemm", {"scale_learning_rate": float("nan")}, "scale_learning_rate"),
        ("lut-gemm", {"solver": "gredy"}, "greedy"),
        ("awq", {"grid": -2}, "grid"),
        ("rtn", {"clip": "serch"}, "search"),
    ],
)
def test_wrong_options_are_named_before_any_work(name, options, words):
    with pytest.raises(SchemeError, match=words):
        get_method(name).parse_options(options)


def test_methods_that_do_not_exist():
    with pytest.raises(SchemeError, match="Did you mean gptq"):
        get_method("gtpq")
    assert {"rtn", "gptq", "awq", "lut-gemm"} <= set(methods())
    for method in methods().values():
        assert method.summary and method.paper and method.formats
