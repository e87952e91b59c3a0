"""Flattened layers of one input are one product, and may compute the norm before them."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lutra.architectures import architecture_of
from lutra.formats.flat import FlatWeight, largest_digit
from lutra.kernels.cpu.flat import CpuFlatKernel
from lutra.kernels.flat import reference
from lutra.kernels.flat.before import Activation, Norm
from lutra.kernels.flat.deferred import Deferred
from lutra.nn_flat import FlatLinear
from lutra.runtime.flat_inputs import before_of, defer, may_read
from lutra.siblings import join_siblings
from lutra.siblings_flat import FlatSiblings, joint_columns

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "phi3": {"pad_token_id": 0},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96, "do_layer_norm_before": True},
    "gpt_neox": {"hidden_act": "gelu"},
    "gpt2": {"activation_function": "gelu_pytorch_tanh", "n_inner": 96},
    "phi": {"hidden_act": "relu"},
}


def flat_layer(rows: int, limit: Tensor, bits: int, bias: bool = False, seed: int = 0) -> Any:
    """Some weights have two or three digits, in other channels for every layer."""
    generator = torch.Generator().manual_seed(seed)
    inputs = limit.numel()
    pieces = 1 + (torch.rand(inputs, generator=generator) < 0.1) * torch.randint(
        1, 3, (inputs,), generator=generator
    )
    most = largest_digit(bits)
    wide = (torch.rand(rows, inputs, generator=generator) * 2 - 1) * (most * pieces + 0.49)
    scale = 0.3 / inputs**0.5 / most * (0.5 + torch.rand(rows, generator=generator))
    weight = FlatWeight.pack(wide.round().long(), scale, limit, bits)
    return FlatLinear.from_weight(weight, torch.randn(rows, generator=generator) if bias else None)


def limits(inputs: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([1, 1, 1, 1, 1, 1, 2, 20])
    return largest_digit(bits) * widths[torch.randint(0, 8, (inputs,), generator=generator)]


def flat_model(family: str, bits: int = 8) -> Any:
    """A random model of a family whose blocks' linears are flattened."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=64, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    entry = architecture_of(config)
    for n, block in enumerate(model.get_submodule(entry.blocks)):
        for group in entry.groups:
            for m, path in enumerate(group):
                dense = block.get_submodule(path)
                rows, inputs = dense.weight.shape
                if type(dense).__name__ == "Conv1D":
                    rows, inputs = inputs, rows
                limit = limits(inputs, bits, seed=n)
                layer = flat_layer(rows, limit, bits, dense.bias is not None, seed=10 * n + m)
                block.set_submodule(path, layer)
    return model


IDS = torch.arange(12).view(2, 6) % 50


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


class Attention(nn.Module):
    def __init__(self, bits: int = 4, bias: bool = False) -> None:
        super().__init__()
        limit = limits(96, bits)
        for seed, (name, rows) in enumerate((("q_proj", 40), ("k_proj", 24), ("v_proj", 7))):
            self.add_module(name, flat_layer(rows, limit.clone(), bits, bias, seed))

    def layers(self) -> list[Any]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers()], -1)

    def join(self) -> Attention:
        FlatSiblings(self.layers(), ["q_proj", "k_proj", "v_proj"])
        return self

    def is_joined(self) -> bool:
        return all("one product with" in repr(layer) for layer in self.layers())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [(0,), (1,), (3, 5), (40,)])
def test_siblings_give_the_bits_of_the_layers(bits: int, bias: bool, tokens: Any) -> None:
    model = Attention(bits, bias)
    x = torch.randn(*tokens, 96)
    stored = {k: v.clone() for k, v in model.state_dict().items()}
    expected = torch.cat(
        [reference.linear(x, layer.stored(), layer.bias) for layer in model.layers()], -1
    )
    assert torch.equal(model(x), expected)
    assert torch.equal(model.join()(x), expected) and not model.is_joined()  # prepared already
    model.q_proj.prepare(torch.float32)
    seen = []
    kernel = copy.copy(model.q_proj.choice.kernel)
    linear = kernel.linear
    kernel.linear = lambda *args: (seen.append(1), linear(*args))[1]
    model.q_proj.siblings.choice = type(model.q_proj.choice)(kernel, "counted")
    assert torch.equal(model(x), expected) and model.is_joined() and len(seen) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    for dtype in (torch.bfloat16, torch.float32):  # parted, and joined again
        moved = model.to(dtype)(x.to(dtype))
        assert model.is_joined() and moved.dtype == dtype
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            assert torch.equal(tensor, stored[name]), name


def test_copies_and_what_is_saved_stand_alone() -> None:
    model = Attention(bias=True).join()
    x = torch.randn(4, 96)
    expected = model(x)
    whole = copy.deepcopy(model)
    assert torch.equal(whole(x), expected) and whole.is_joined()
    one = copy.deepcopy(model.k_proj)
    assert torch.equal(one(x), expected[:, 40:64])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    again = Attention(bias=True).join()
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert torch.equal(again(x), expected)
    ref = weakref.ref(model.q_proj.siblings)
    del model, whole, one
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("what", ["limit", "bits", "bias"])
def test_layers_that_differ_stay_apart(what: str) -> None:
    model = Attention()
    x = torch.randn(3, 96)
    if what == "limit":
        model.k_proj.input_limit.data[3] += 1
    elif what == "bits":
        model.k_proj = flat_layer(24, limits(96, 8), 8)
    else:
        model.k_proj.bias = nn.Parameter(torch.randn(24))
    expected = torch.cat(
        [reference.linear(x, layer.stored(), layer.bias) for layer in model.layers()], -1
    )
    assert torch.equal(model.join()(x), expected)
    assert not model.is_joined() and "alone" in repr(model.q_proj)


def test_joint_columns() -> None:
    sources = [torch.tensor(s, dtype=torch.int32) for s in ([1, 1, 4], [], [4, 4, 2], [4, 1])]
    joint, places = joint_columns(sources, 6)
    assert joint.tolist() == [1, 1, 2, 4, 4]
    assert [p.tolist() for p in places] == [[0, 1, 3], [], [3, 4, 2], [3, 0]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernel of this machine computes what comes before; what it was asked to compute."""
    asked: list[Any] = []
    linear_of = CpuFlatKernel.linear_of

    def counted(self: Any, x: Tensor, before: Any, *rest: Any) -> Tensor:
        asked.append(before)
        return linear_of(self, x, before, *rest)

    for kind in (CpuFlatKernel, reference.ReferenceFlatKernel):
        monkeypatch.setattr(kind, "reads", lambda self, before, spec: True)
        monkeypatch.setattr(kind, "linear_of", counted)
    return asked


@pytest.mark.parametrize("family", FAMILIES)
def test_models_compute_the_same(family: str, reads: list[Any]) -> None:
    model = flat_model(family)
    plain = logits(model)
    assert not reads
    groups = join_siblings(model)
    assert groups == {"llama": 4, "qwen2": 4, "opt": 2, "phi": 2}.get(family, 0)
    assert torch.equal(logits(model.to(torch.float64).float()), plain)  # parted and joined
    made = defer(model)
    # phi and gpt_neox: the norm before attention is that of the MLP, or beside it
    assert made == {"phi": 4}.get(family, 6)
    assert defer(model) == 0  # a second time changes nothing
    found = logits(model)
    assert torch.equal(found, plain)
    kinds = {type(before) for before in reads}
    assert kinds == {Norm, Activation}
    gated = [b for b in reads if isinstance(b, Activation)]
    assert all((b.times is not None) == (family in ("llama", "qwen2", "phi3")) for b in gated)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), plain)
    reads.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits(model)
    assert not reads


def test_hooks_and_others_see_results(reads: list[Any]) -> None:
    model = flat_model("llama")
    block = model.model.layers[0]
    expected = []
    hook = block.input_layernorm.register_forward_hook(lambda m, a, y: expected.append(y.clone()))
    plain = logits(model)
    hook.remove()
    defer(model)
    seen = []
    block.input_layernorm.register_forward_hook(lambda m, a, y: seen.append(y))
    assert torch.equal(logits(model), plain)
    assert isinstance(seen[0], Deferred) and "Norm" in repr(seen[0])
    assert torch.equal(seen[0] + 0, expected[0]) and seen[0].is_computed
    assert torch.equal(seen[0].view(-1), expected[0].view(-1))
    block.input_layernorm.register_forward_hook(lambda m, a, y: y * 2)
    assert not torch.equal(logits(model), plain)


def test_what_is_trained_or_compiled_is_not_deferred(reads: list[Any]) -> None:
    model = flat_model("llama")
    defer(model)
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(2, 64)
    model(IDS)  # layers are prepared
    assert type(norm(x.requires_grad_())) is Tensor
    with torch.no_grad():
        assert isinstance(norm(x), Deferred)
        compiled = torch.compile(norm, backend="eager", fullgraph=True)
        assert type(compiled(x.detach())) is Tensor
    assert type(norm.bfloat16()(x.detach())) is Tensor  # the weight is of another dtype


def test_a_dropped_model_is_freed() -> None:
    model = flat_model("llama")
    join_siblings(model)
    defer(model)
    logits(model)
    layer = weakref.ref(model.model.layers[0].mlp.down_proj)
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recorded_steps_leave_the_activation_to_the_layer(family: str, reads: list[Any]) -> None:
    from lutra.runtime.step import DecodeStep

    model = flat_model(family)
    if family == "opt":
        model.config.pad_token_id = 1
    with torch.no_grad():
        expected = model.generate(
            IDS[:, :3], attention_mask=torch.ones(2, 3), max_new_tokens=6, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        step = DecodeStep(model, 2, 256)
        assert step.fallback is None
        step.prefill(IDS[:, :3])
        for _ in range(5):
            step.advance()
    assert torch.equal(step.tokens[3:9].T, expected[:, 3:])
    assert {type(before) for before in reads} == {Activation}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_on_a_gpu(family: str, bits: int) -> None:
    model = flat_model(family, bits).to("cuda", torch.bfloat16)
    ids = IDS.cuda()
    with torch.no_grad():
        plain = model(ids).logits
        assert {m.choice.kernel.name for m in model.modules() if isinstance(m, FlatLinear)} == {
            "cuda-flat"
        }
        join_siblings(model)
        model.to("cpu").to("cuda")
        assert torch.equal(model(ids).logits, plain)
        assert defer(model) > 0
        found = model(ids).logits
        error = (found - plain).double().norm() / plain.double().norm()
        assert error < 0.05, error  # a norm may round otherwise, and so an integer
        for module in model.modules():  # activations alone
            if isinstance(before_of(module), Norm):
                module.__dict__.pop("forward", None)
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tokens_on_a_gpu_are_recorded(dtype: torch.dtype) -> None:
    """Float32 runs the reference, which can be captured too."""
    from lutra.runtime.step import DecodeStep

    model = flat_model("llama").to("cuda", dtype)
    join_siblings(model)
    defer(model)
    with torch.no_grad():
        step = DecodeStep(model, 2, 256, greedy=False)
        ids = IDS.cuda()
        step.prefill(ids[:, :3])
        for place in range(3, 6):
            step.ids.copy_(ids[:, place : place + 1])
            found = step.advance()
        expected = model(ids).logits[:, -1]
    assert step.is_recorded
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_may_read_is_known_without_weights(family: str) -> None:
    """`lutra warmup` compiles what the model would ask for."""
    config = flat_model(family).config
    entry = architecture_of(config)
    first, last = f"{entry.blocks}.0.{entry.groups[0][0]}", f"{entry.blocks}.1.{entry.linears[-1]}"
    assert [type(before) for before in may_read(config, first)] == [Norm]
    assert {type(before) for before in may_read(config, last)} == {Activation}
    assert may_read(config.to_dict(), "lm_head") == []


def test_programs_of_a_layer_are_listed_for_any_card() -> None:
    from lutra.kernels.cuda.flat import CudaFlatKernel
    from lutra.kernels.cuda.launch import TYPICAL_CARDS
    from lutra.kernels.flat import FlatSpec

    spec = FlatSpec(256, 512, 512, 4, False, False, torch.device("cuda", 0), torch.bfloat16)
    for arch, gpu in TYPICAL_CARDS.items():
        listed = CudaFlatKernel().instances(spec, [1, 1000], [(0, 0), (4, 0)], gpu)
        names = {name for name, _ in listed}
        hopper = {"flat_quantize", "flat_few", "flat_linear"}
        assert names == (hopper if arch == "sm_90a" else {"flat_quantize", "flat_mma"})
        assert {d["INPUT"] for n, d in listed if n == "flat_quantize"} == {0, 4}
        assert {d["HORNER"] for n, d in listed if n != "flat_quantize"} == {0, 1}
