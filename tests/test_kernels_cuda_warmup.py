"""`lutra warmup` and `lutra inspect --kernels`: what is compiled and said of a model's kernels."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import quantize_tiny

from lutra import cli
from lutra.errors import CheckpointError, KernelError, SchemeError
from lutra.inspection import checkpoint_products, inspect_checkpoint
from lutra.kernels.cuda import CudaKernel, nvrtc
from lutra.kernels.cuda.launch import TYPICAL_CARDS
from lutra.warmup import warmup

try:
    nvrtc.version()
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import save_tiny_model

    root = tmp_path_factory.mktemp("warmup")
    save_tiny_model(root / "src", "llama")
    quantize_tiny(root / "src", root / "quantized", "rtn", 4)
    return root / "quantized"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cubin"


def test_products_are_layers_and_siblings(quantized: Path) -> None:
    checkpoint, products = checkpoint_products(quantized)
    names = [name for product in products for name in product.names]
    assert sorted(names) == sorted(n[: -len(".weight_scale")] for n in checkpoint.names()
                                   if n.endswith(".weight_scale"))
    joined = {tuple(n.rpartition(".")[2] for n in p.names): p for p in products}
    assert {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",)} <= joined.keys()
    three = joined["q_proj", "k_proj", "v_proj"]
    parts = [checkpoint.shape(f"{name}.weight") for name in three.names]
    assert three.out_features == sum(shape[1] for shape in parts)


def test_warmup_compiles_what_runs_and_only_once(quantized: Path, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = warmup(
        quantized, arch="sm_90a", tokens=[1, 700], dtype="float16",
        on_progress=lambda done, total, _: seen.append((done, total)),
    )
    assert first["arch"] == "sm_90a" and first["card"] is None and first["dtype"] == "float16"
    assert first["compiled"] == first["kernels"] == len(list(cache.glob("*.cubin"))) > 1
    assert seen[-1] == (first["kernels"], first["kernels"])
    again = warmup(quantized, arch="sm_90a", tokens=[1, 700], dtype="float16")
    assert again["compiled"] == 0 and again["kernels"] == first["kernels"]
    _, products = checkpoint_products(quantized)
    for product in products:  # what a product would launch is on disk
        spec = product.spec(torch.device("cuda", 0), torch.float16)
        gpu = TYPICAL_CARDS["sm_90a"]
        for name, defines in CudaKernel().instances(spec, [1, 700], product.scale_dtype, gpu):
            assert nvrtc.is_cached(name, defines, "sm_90a")


def test_refusals_of_warmup_are_sentences(
    quantized: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SchemeError, match="--dtype"):
        warmup(quantized, arch="sm_90a", dtype="float32")
    with pytest.raises(KernelError, match="sm_90a"):
        warmup(quantized, arch="sm_12", dtype="float16")
    with pytest.raises(KernelError, match="no warmup"):
        warmup(quantized, device="cpu", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match="--arch sm_90a"):
            warmup(quantized, dtype="float16")
    with pytest.raises(CheckpointError, match="not quantized"):
        warmup(quantized.parent / "src", arch="sm_90a", dtype="float16")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path / "file"))
    with pytest.raises(KernelError, match="LUTRA_CACHE"):
        warmup(quantized, arch="sm_90a", dtype="float16")


def test_inspect_says_which_program_runs_for_how_many_tokens(quantized: Path) -> None:
    plain = inspect_checkpoint(quantized)
    assert all("batches" not in layer for layer in plain["layers"])
    result = inspect_checkpoint(quantized, kernels=True)
    for layer in result["layers"]:
        assert layer["name"] in layer["runs_with"]
        assert [b["tokens"] for b in layer["batches"]][:3] == [1, 2, 4]
        assert all(b["program"] and b["reason"] for b in layer["batches"])


def test_programs_of_the_cuda_kernel_by_name(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lutra.kernels.cuda import launch

    _, products = checkpoint_products(quantized)
    monkeypatch.setattr(launch, "card", lambda index: TYPICAL_CARDS["sm_90a"])
    spec = products[0].spec(torch.device("cuda", 0), torch.float16)
    names = [CudaKernel().describe(spec, tokens)[0] for tokens in (1, 2, 4, 4096)]
    assert names[:3] == ["binary_linear", "binary_linear", "byte_linear"] and names[3]


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["lutra", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command_line(
    quantized: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("warmup", quantized, "--arch", "sm_90a", "--tokens", "1", "--dtype", "bfloat16")
    assert _run(monkeypatch, *arguments, "--json") == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"arch", "card", "dtype", "kernels", "compiled", "seconds", "cache", "layers"} == (
        result.keys()
    )
    assert _run(monkeypatch, *arguments) == 0
    assert "0 compiled" in " ".join(capsys.readouterr().err.split())
    assert _run(monkeypatch, "warmup", quantized, "--arch", "sm_1", "--dtype", "float16") == 1
    assert "no architecture" in capsys.readouterr().err
    assert _run(monkeypatch, "inspect", quantized, "--kernels") == 0
    out = capsys.readouterr().out
    assert "q_proj, k_proj, v_proj" in out and "1 and more" in out
