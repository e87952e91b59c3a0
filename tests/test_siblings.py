"""Linears with one input run as one product, and everything else stays as it was."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from quantized import ids, logits, make_source, quantize_tiny, tensors_of
from torch import Tensor, nn

import lutra
from lutra.nn import QuantizedLinear
from lutra.scheme import Format
from lutra.siblings import Siblings, join_siblings


def _layer(rows: int, columns: int, name: str, bias: bool = False, seed: int = 0) -> Any:
    format = Format.parse(name)
    generator = torch.Generator().manual_seed(1000 * seed + rows)
    layer = QuantizedLinear(columns, rows, format, bias=bias, dtype=torch.float32)
    for parameter in layer.parameters():
        if parameter.dtype == torch.int32:
            parameter.data = torch.randint(
                -(2**31), 2**31 - 1, parameter.shape, dtype=torch.int32, generator=generator
            )
        elif parameter.dtype == torch.uint8:
            parameter.data = torch.randint(
                0, 2**format.bits, parameter.shape, dtype=torch.uint8, generator=generator
            )
        else:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data = (0.05 + 0.1 * noise).to(parameter.dtype)
    return layer


class _Attention(nn.Module):
    """Three siblings of odd sizes, and a layer that is none."""

    def __init__(self, name: str, bias: bool = False, columns: int = 96) -> None:
        super().__init__()
        self.q_proj = _layer(40, columns, name, bias)
        self.k_proj = _layer(24, columns, name, bias)
        self.v_proj = _layer(7, columns, name, bias)

    def layers(self) -> list[Any]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def _exact(model: _Attention, x: Tensor) -> Tensor:
    """The product in float64 from the stored weights."""
    rows = []
    for layer in model.layers():
        y = x.double() @ layer.bitplanes().unpack(torch.float64).T
        rows.append(y if layer.bias is None else y + layer.bias.double())
    return torch.cat(rows, -1)


def _joined(model: _Attention) -> _Attention:
    Siblings(model.layers(), ["q_proj", "k_proj", "v_proj"])
    model.q_proj.prepare(torch.float32)
    return model


def _is_joined(model: _Attention) -> bool:
    return all("one product with" in repr(layer) for layer in model.layers())


def _products(layer: Any) -> list[Tensor]:
    """From now on, the inputs of every product that the layer's kernel computes."""
    seen: list[Tensor] = []
    kernel = copy.copy(layer.siblings.choice.kernel)
    linear = kernel.linear

    def counted(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.clone())
        return linear(x, *rest)

    kernel.linear = counted
    layer.siblings.choice = type(layer.siblings.choice)(kernel, "counted")
    return seen


NAMES = ["bcq3g32", "ubcq4row", "int4g32", "bcq3g64+serve2", "ubcq2g32+f32"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [(1,), (3, 5), (40,)])
@pytest.mark.parametrize("inference", [False, True])
def test_the_product_is_that_of_the_stored_weights(name, bias, tokens, inference):
    model = _Attention(name, bias)
    x = torch.randn(*tokens, 96)
    exact = _exact(model, x)
    apart = model(x)
    _joined(model)
    seen = _products(model.q_proj)
    with torch.inference_mode(inference):
        found = model(x)
    assert _is_joined(model) and len(seen) == 1
    assert (found - exact).abs().max() < 2e-4 * exact.abs().max()
    assert torch.equal(found, apart) or (found - apart).abs().max() < 1e-5 * exact.abs().max()
    assert torch.equal(_exact(model, x), exact)  # the stored form, given back


def test_other_inputs_get_other_results():
    model = _joined(_Attention("bcq2g32"))
    a, b = torch.randn(2, 96), torch.randn(2, 96)
    q, k = model.q_proj(a), model.k_proj(b)
    exact_a, exact_b = _exact(model, a), _exact(model, b)
    assert torch.allclose(q.double(), exact_a[:, :40], atol=1e-3)
    assert torch.allclose(k.double(), exact_b[:, 40:64], atol=1e-3)
    first = model.v_proj(a).clone()
    a.mul_(2)  # changed in place between siblings
    assert torch.allclose(model.q_proj(a).double(), 2 * exact_a[:, :40], atol=2e-3)
    assert torch.allclose(first.double(), exact_a[:, 64:], atol=1e-3)
    with torch.inference_mode():  # where torch does not count changes
        x = a.clone()
        model.k_proj(x)
        x.zero_()
        assert model.k_proj(x).abs().max() == 0


def test_activations_are_not_kept():
    model = _joined(_Attention("bcq2g32"))
    group = model.q_proj.siblings
    x = torch.randn(2, 96)
    model(x)
    assert group._held is None
    model.q_proj(x)  # the others never come
    assert group._held is not None
    y = weakref.ref(group._held.y)
    del x
    gc.collect()
    assert group._held is None and y() is None


def test_gradients_pass_through():
    model = _Attention("bcq3g32")
    x = torch.randn(3, 96, requires_grad=True)
    weight = torch.cat([layer.bitplanes().unpack() for layer in model.layers()])
    _joined(model)
    with torch.no_grad():
        model.q_proj(x)  # its result has no gradient, so it must not serve the next call
    upstream = torch.randn(3, 71)
    (model(x) * upstream).sum().backward()
    assert torch.allclose(x.grad, upstream @ weight, atol=1e-3)


def test_threads_do_not_mix():
    model = _joined(_Attention("bcq2g32"))
    inputs = [torch.randn(1, 96) for _ in range(4)]
    exact = [_exact(model, x) for x in inputs]
    failures = []

    def work(i: int) -> None:
        for _ in range(100):
            if not torch.allclose(model(inputs[i]).double(), exact[i], atol=1e-3):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_memory_is_not_doubled():
    model = _Attention("bcq3g32", columns=4096)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    _joined(model)
    held = {id(t): t.numel() * t.element_size() for t in model.q_proj.siblings.prepared}
    left = sum(p.numel() * p.element_size() for p in model.parameters())
    assert left == 0 and sum(held.values()) < 1.2 * stored


def test_formats_that_differ_stay_apart_and_say_so():
    model = _Attention("bcq2g32")
    model.v_proj = _layer(7, 96, "bcq3g32")
    x = torch.randn(2, 96)
    exact = _exact(model, x)
    _joined(model)
    assert not _is_joined(model)
    assert "alone: their formats differ" in repr(model.q_proj)
    assert "v_proj bcq3g32" in model.q_proj.siblings.apart
    assert torch.allclose(model(x).double(), exact, atol=1e-3)


def test_serving_lower_precisions_one_by_one():
    model = _joined(_Attention("bcq3g32+serve2"))
    x = torch.randn(2, 96)
    model.q_proj.serve(2)
    assert torch.allclose(model(x).double(), _exact(model, x), atol=1e-3)
    assert not _is_joined(model)
    model.k_proj.serve(2)
    model.v_proj.serve(2)
    assert torch.allclose(model(x).double(), _exact(model, x), atol=1e-3)
    assert _is_joined(model)


def test_states_move_and_load():
    model = _joined(_Attention("ubcq3g32", bias=True))
    x = torch.randn(2, 96)
    exact = _exact(model, x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert before.keys() == _Attention("ubcq3g32", bias=True).state_dict().keys()
    storages = [t.untyped_storage().data_ptr() for t in model.state_dict().values()]
    assert len(set(storages)) == len(storages)  # what is saved shares no memory
    assert torch.allclose(model.double()(x.double()).float(), exact.float(), atol=1e-3)
    assert torch.allclose(model.float().to("cpu")(x).double(), exact, atol=1e-3)
    assert _is_joined(model)
    other = _joined(_Attention("ubcq3g32", bias=True))
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(before)
    assert torch.allclose(other(x).double(), exact, atol=1e-3)
    model.q_proj.bias.data += 1
    assert torch.allclose(model(x)[:, :40].double(), exact[:, :40] + 1, atol=1e-3)
    for layer in model.layers():
        layer.release()
    assert not _is_joined(model)
    for name, tensor in model.state_dict().items():
        if "bias" not in name:
            assert torch.equal(tensor, before[name])


def test_copies_are_whole_and_separate():
    model = _joined(_Attention("bcq3g32", bias=True))
    x = torch.randn(2, 96)
    exact = _exact(model, x)
    other = copy.deepcopy(model)
    assert other.q_proj.siblings is other.k_proj.siblings is not model.q_proj.siblings
    assert torch.allclose(other(x).double(), exact, atol=1e-3) and _is_joined(other)
    other.q_proj.bias.data += 1
    other.v_proj.release()
    assert torch.allclose(model(x).double(), exact, atol=1e-3) and _is_joined(model)
    alone = copy.deepcopy(model.k_proj)
    assert torch.allclose(alone(x).double(), exact[:, 40:64], atol=1e-3)
    assert "not all of them were copied" in repr(alone)


def test_a_dropped_model_is_freed_at_once():
    model = _joined(_Attention("bcq2g32"))
    prepared = weakref.ref(model.q_proj.siblings.prepared[0])
    gc.disable()
    try:
        del model
        assert prepared() is None
    finally:
        gc.enable()


def test_torch_compile_computes_once_and_the_same():
    model = _joined(_Attention("bcq3g32"))
    group = model.q_proj.siblings
    x = torch.randn(3, 96)
    expected = model(x)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(sum("linear" in str(n.target) for n in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
        assert group._held is None and group._traced is None
    assert graphs == [1]


# ---- models


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "qwen2", "gpt2"])
def test_models_of_transformers(family, tmp_path):
    src = make_source(tmp_path / "src", family)
    quantize_tiny(src, tmp_path / "out", "rtn", 4)
    model, _ = lutra.load(tmp_path / "out")
    found = logits(model)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    joined = {id(m.siblings) for m in layers if m._is_joined}
    per_block = {"llama": 2, "qwen2": 2, "opt": 1, "phi": 1, "gpt2": 0}[family]
    assert len(joined) == 2 * per_block
    assert join_siblings(model) == 0  # again: nothing left to join
    for layer in layers:
        layer.release()
        layer.siblings = None
    assert (logits(model) - found).abs().max() < 1e-5 * found.abs().max()
    again, _ = lutra.load(tmp_path / "out")
    again.save_pretrained(tmp_path / "saved")
    out, saved = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "saved")
    for name in out.keys() & saved.keys():
        assert torch.equal(out[name].float(), saved[name].float()), name
    cached = again.generate(ids()[:, :6], max_new_tokens=8, do_sample=False)
    plain = again.generate(ids()[:, :6], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
