"""What goes wrong around the CUDA kernels ends in a sentence or on another kernel, said aloud."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lutra.kernels.cuda as cuda
from lutra import cli
from lutra.errors import KernelError, ResourceError
from lutra.formats.bitplanes import BitPlanes
from lutra.kernels import dispatch
from lutra.kernels.cuda import launch, nvrtc, products
from lutra.kernels.cuda.launch import TYPICAL_CARDS, Card
from lutra.kernels.dispatch import LinearSpec
from lutra.kernels.reference import ReferenceKernel

REFERENCE = (ReferenceKernel(),)
FORM = {"BITS": 2, "GROUP": 128, "UNIFORM": 1, "SCALE_FLOAT": 0, "X_BF16": 0}


def spec(device: str = "cuda", dtype: torch.dtype = torch.float16) -> LinearSpec:
    index = 0 if device == "cuda" else None
    return LinearSpec(64, 256, 2, 128, True, torch.device(device, index), dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a supported GPU with a fitting driver were there."""
    cuda.unusable.cache_clear()
    monkeypatch.setattr(launch, "card", lambda index: TYPICAL_CARDS["sm_90a"])
    monkeypatch.setattr(launch, "driver_version", lambda: (99, 0))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "supported_archs", lambda: frozenset({80, 90}))
    yield
    cuda.unusable.cache_clear()


def test_without_a_gpu_there_are_no_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.kernels() == []


@pytest.mark.parametrize("kind", ["planes", "flat"])
def test_the_command_line_says_that_there_is_no_gpu(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["lutra", "bench", "kernel", "--device", "cuda:3",
                                      "--kind", kind])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "there is no device cuda:3" in said and "Traceback" not in said


def test_a_cpu_layer_says_why_the_gpu_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "kernels", lambda: (cuda.CudaKernel(), *REFERENCE))
    dispatch.choose.cache_clear()
    with caplog.at_level("INFO"):
        choice = dispatch.choose(spec("cpu"))
    dispatch.choose.cache_clear()
    assert choice.kernel.name == "reference" and "on cpu" in choice.reason


@pytest.mark.usefixtures("gpu")
def test_a_supported_card_is_used() -> None:
    assert cuda.CudaKernel().supports(spec()) is None


@pytest.mark.usefixtures("gpu")
def test_an_old_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "card", lambda index: Card(0, "GTX 1080", (6, 1), 20, 49152, 98304))
    assert "GTX 1080 has compute capability 6.1" in (cuda.CudaKernel().supports(spec()) or "")


@pytest.mark.usefixtures("gpu")
def test_a_card_newer_than_the_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "card", lambda index: Card(0, "R100", (14, 0), 200, 232448, 233472))
    refusal = cuda.CudaKernel().supports(spec()) or ""
    assert "R100" in refusal and "newer nvidia-cuda-nvrtc" in refusal


@pytest.mark.usefixtures("gpu")
def test_an_old_driver_is_refused_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "driver_version", lambda: (12, 4))
    refusal = cuda.CudaKernel().supports(spec()) or ""
    assert "driver supports CUDA 12.4" in refusal and "update the driver" in refusal


@pytest.mark.usefixtures("gpu")
def test_without_nvrtc_the_next_kernel_runs_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> tuple[int, int]:
        raise KernelError("NVRTC cannot be loaded here; install it with: pip install lutra[cuda]")

    monkeypatch.setattr(nvrtc, "version", missing)
    monkeypatch.setattr(dispatch, "kernels", lambda: (cuda.CudaKernel(), *REFERENCE))
    dispatch.choose.cache_clear()
    choice = dispatch.choose(spec())
    dispatch.choose.cache_clear()
    assert choice.kernel.name == "reference" and "pip install lutra[cuda]" in choice.reason


def test_words_of_the_driver_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    monkeypatch.setattr(driver, "cuGetErrorString", lambda status: (0, b"out of memory"))
    failed = (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
    with pytest.raises(KernelError, match="load kernel x: out of memory"):
        launch._ok(failed, "load kernel x")


def test_too_little_memory_for_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB\nmore")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ResourceError, match="128 MiB.*fewer bits"):
        products.dense_workspace(torch.device("cuda", 7), torch.float16)


def test_no_allocation_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KernelError, match="run the layer once"):
        products.dense_workspace(torch.device("cuda", 7), torch.float16)


def test_scales_of_another_dtype_are_refused() -> None:
    signs = torch.randint(0, 2, (2, 64, 256)) * 2 - 1
    scale, offset = torch.rand(2, 64, 2), torch.randn(64, 2)
    weight = BitPlanes.from_signs(signs, scale.bfloat16(), offset.bfloat16(), 128)
    with pytest.raises(KernelError, match="bfloat16"):
        cuda.CudaKernel().prepare(weight, spec("cpu"))


@pytest.mark.parametrize(
    ("dtype", "features", "device", "words"),
    [
        (torch.float32, 256, "cuda:0", "float32"),
        (torch.float16, 128, "cuda:0", "128"),
        (torch.float16, 256, "cuda:1", "cuda:1"),
    ],
)
def test_wrong_activations_are_named(
    dtype: torch.dtype, features: int, device: str, words: str
) -> None:
    from lutra.kernels.cuda.ops import DTYPES
    from lutra.kernels.ops import check_activations

    x = SimpleNamespace(dtype=dtype, shape=(1, features), device=device)
    with pytest.raises(RuntimeError, match=words):
        check_activations(x, SimpleNamespace(device="cuda:0"), 256, DTYPES)  # type: ignore[arg-type]


def _compile(folder: str, count: multiprocessing.Value) -> None:  # type: ignore[valid-type]
    os.environ["LUTRA_CACHE"] = folder
    real = nvrtc.compile_uncached

    def counted(*args: object) -> tuple[bytes, str]:
        with count.get_lock():  # type: ignore[attr-defined]
            count.value += 1  # type: ignore[attr-defined]
        return real(*args)  # type: ignore[arg-type]

    nvrtc.compile_uncached = counted  # type: ignore[assignment]
    cubin = nvrtc.compile_cubin("dequantize", FORM, "sm_80")
    sys.exit(0 if cubin[:4] == b"\x7fELF" else 1)


def test_two_processes_compile_once(tmp_path: Path) -> None:
    try:
        nvrtc.version()
    except KernelError as error:
        pytest.skip(str(error))
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    processes = [
        context.Process(target=_compile, args=(str(tmp_path), count)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and count.value == 1


def test_a_cache_that_is_read_only_compiles_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_uncached", lambda *_: (b"cubin", ""))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(nvrtc, "_write", refused)
    nvrtc._say_once.cache_clear()
    assert nvrtc.compile_cubin("dequantize", FORM, "sm_90a") == b"cubin"
    assert "cannot be used" in caplog.text and "compiling in memory" in caplog.text


def test_what_one_user_compiles_others_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_uncached", lambda *_: (b"cubin", ""))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    before = os.umask(0o022)
    try:
        nvrtc.compile_cubin("dequantize", FORM, "sm_90a")
    finally:
        os.umask(before)
    (entry,) = tmp_path.glob("cubin/*.cubin")
    assert entry.stat().st_mode & 0o777 == 0o644
    assert not list(tmp_path.glob("cubin/*.tmp"))
