"""Layers on a GPU: compiled, captured, shared between streams, and given what they cannot take."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lutra.errors import KernelError, ResourceError
from lutra.formats.bitplanes import BitPlanes, groups_per_row
from lutra.nn import QuantizedLinear
from lutra.scheme import Format

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = (1, 3, 12, 40, 160)


def random_layer(
    format: str, out: int = 328, inputs: int = 1088, bias: bool = True, device: str = "cuda"
) -> QuantizedLinear:
    form = Format.parse(format)
    group = form.group_size_for(inputs)
    groups = groups_per_row(inputs, group)
    signs = torch.randint(0, 2, (form.bits, out, inputs)) * 2 - 1
    scale = torch.rand(form.bits if form.kind == "bcq" else 1, out, groups) * 0.1 + 0.01
    weight = BitPlanes.from_signs(signs, scale.half(), torch.randn(out, groups).half() / 50, group)
    layer = QuantizedLinear.from_weight(weight, form, torch.randn(out).half() if bias else None)
    return layer.to(device)


@pytest.mark.parametrize("format", ["bcq3g128", "ubcq4g128", "ubcq2g64"])
def test_a_compiled_layer_gives_the_same_bits(format: str) -> None:
    torch.manual_seed(0)
    layer = random_layer(format)
    layer.prepare(torch.float16)
    compiled = torch.compile(lambda x: layer(x * 2).relu(), fullgraph=True)
    for tokens in TOKENS[:4]:
        x = torch.randn(tokens, 1088, device="cuda").half()
        assert torch.equal(compiled(x), layer(x * 2).relu())


def test_the_op_is_what_torch_asks_of_one() -> None:
    layer = random_layer("bcq3g128")
    layer.prepare(torch.float16)
    x = torch.randn(2, 3, 1088, device="cuda").half()
    arguments = (x, *layer.prepared_tensors(), layer.bias, 328, 1088, 3, 128, False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lutra.cuda_linear.default, arguments, test_utils=tests)


@pytest.mark.parametrize("format", ["bcq2g128", "ubcq3g128"])
def test_a_captured_layer_gives_the_same_bits_at_every_replay(format: str) -> None:
    torch.manual_seed(1)
    layer = random_layer(format)
    layer.prepare(torch.float16)
    for tokens in TOKENS:
        x = torch.randn(tokens, 1088, device="cuda").half()
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(layer(x)[:, :1].expand(-1, 1088) + x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(layer(x)[:, :1].expand(-1, 1088) + x))


@pytest.mark.parametrize("format", ["bcq3g128", "ubcq4g128", "bcq4g64"])
def test_runs_on_streams_and_threads_give_the_same_bits(format: str) -> None:
    torch.manual_seed(2)
    layer = random_layer(format, 2064, 2176)
    layer.prepare(torch.float16)
    inputs = [torch.randn(tokens, 2176, device="cuda").half() for tokens in TOKENS]
    expected = [layer(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                for x, y in zip(inputs, expected, strict=True):
                    if not torch.equal(layer(x), y):
                        wrong.append(len(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_kernel_that_is_not_loaded_is_not_loaded_during_capture() -> None:
    layer = random_layer("bcq5g128", 136, 416)  # a shape and format of this test alone
    layer.prepare(torch.float16)
    x = torch.randn(3, 416, device="cuda").half()
    with pytest.raises(KernelError, match="run the layer once"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
    torch.cuda.synchronize()
    once = layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(once, y)


def test_activations_elsewhere_and_of_other_dtypes() -> None:
    layer = random_layer("bcq3g128")
    layer.prepare(torch.float16)
    with pytest.raises(RuntimeError, match="activations are on cpu, the weight on cuda:0"):
        layer(torch.randn(2, 1088).half())
    half = torch.randn(2, 1088, device="cuda").half()
    expected = layer(half)
    # Another dtype is another choice of kernel, said in words; and back again.
    wide = layer(half.float())
    assert layer.choice is not None and "float32" in layer.choice.reason
    assert wide.dtype == torch.float32 and torch.allclose(wide, expected.float(), atol=0.02)
    brain = layer(half.bfloat16())
    assert brain.dtype == torch.bfloat16
    assert torch.equal(layer(half), expected)


def test_a_forced_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.kernels import dispatch

    layer = random_layer("bcq3g128")
    monkeypatch.setenv("LUTRA_KERNEL", "cuda")
    dispatch.choose.cache_clear()
    with pytest.raises(KernelError, match="LUTRA_KERNEL=cuda cannot run.*float32"):
        layer.prepare(torch.float32)
    dispatch.choose.cache_clear()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.kernels.cuda import products

    monkeypatch.setattr(products, "_workspaces", {})
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + (16 << 20)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(ResourceError, match="no room for the 128 MiB"):
            products.dense_workspace(device, torch.float16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_fewer_planes_are_served_without_a_copy_on_disk() -> None:
    torch.manual_seed(3)
    layer = random_layer("ubcq4g128")
    x = torch.randn(5, 1088, device="cuda").half()
    weight = layer.bitplanes()
    layer.prepare(torch.float16)
    whole = layer(x)
    cut = weight.prefix(2) if weight.uniform else weight
    exact = x.double() @ cut.unpack(torch.float64).T + layer.bias.double()
    part = QuantizedLinear.from_weight(cut, Format.parse("ubcq2g128"), layer.bias)
    y = part(x)
    assert (y.double() - exact).norm() <= 1.3 * (exact.half().double() - exact).norm()
    assert not torch.equal(whole, y)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import save_tiny_model
    from quantized import quantize_tiny

    root = tmp_path_factory.mktemp("layers")
    save_tiny_model(root / "src", "llama")
    quantize_tiny(root / "src", root / "quantized", "rtn", 4)
    return root / "quantized"


def test_the_command_line_on_a_gpu(quantized: Path, tmp_path: Path) -> None:
    environment = os.environ | {"LUTRA_CACHE": str(tmp_path / "cache")}

    def lutra(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "lutra", *arguments],
            env=environment, capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    said = lutra("warmup", str(quantized), "--device", "cuda", "--tokens", "1,40", "--dtype",
                 "float16")
    assert "compiled" in said and any((tmp_path / "cache" / "cubin").glob("*.cubin"))
    assert "binary_linear" in lutra("inspect", str(quantized), "--kernels", "--device", "cuda",
                                    "--dtype", "float16")
