"""Every CUDA kernel compiles for every architecture, without spills. Needs NVRTC, not a GPU.

A representative set by default; all instances with ``LUTRA_COMPILE_ALL=1`` (hours).
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lutra.errors import KernelError
from lutra.kernels.cuda import nvrtc
from lutra.kernels.cuda.launch import TYPICAL_CARDS as CARDS
from lutra.kernels.cuda.layout import layout_of
from lutra.kernels.cuda.plans import code_plans, few_plans, field_plans, has_steps
from lutra.kernels.cuda.products import code_defines, few_defines, field_defines

try:
    nvrtc.version()
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)

ALL = os.environ.get("LUTRA_COMPILE_ALL") == "1"
Defines = dict[str, int]


def formats(arch: str) -> Iterator[Defines]:
    """Storage formats: all of them, or the one used most and one that takes many registers."""
    chosen = {(3, 128, 0, 0, 0), (8, 32, 0, 1, 1)}
    if arch == "sm_90a":
        chosen.add((4, 128, 1, 0, 0))
    axes = itertools.product(range(1, 9), (32, 64, 128, 256), (0, 1), (0, 1), (0, 1))
    for bits, group, uniform, scale_float, bf16 in axes:
        if ALL or (bits, group, uniform, scale_float, bf16) in chosen:
            yield {
                "BITS": bits, "GROUP": group, "UNIFORM": uniform, "SCALE_FLOAT": scale_float,
                "X_BF16": bf16,
            }


def instances(arch: str) -> Iterator[tuple[str, Defines]]:
    for form in formats(arch):
        yield "dequantize", form
        uniform = bool(form["UNIFORM"])
        group_size = 4096 if form["GROUP"] == 256 else form["GROUP"]
        layout = layout_of(4096, 4096, form["BITS"], group_size, uniform)
        scale = torch.float32 if form["SCALE_FLOAT"] else torch.float16
        x = torch.bfloat16 if form["X_BF16"] else torch.float16
        for tokens in (1, 2, 4, 8, 16) if ALL else (1, 8):
            plans = few_plans(layout, scale.itemsize, tokens, CARDS[arch])
            for plan in plans if ALL else plans[:1]:
                yield plan.kernel, few_defines(plan, layout, uniform, scale, x)
        for tokens in (8, 16, 32, 64) if ALL else (16, 64):
            fields = field_plans(layout, uniform, tokens, CARDS[arch])
            for field in fields if ALL else fields[:1]:
                arrange, main = field_defines(field, layout, uniform, scale, x)
                yield "arrange", arrange
                yield "field_linear", main
        for tokens in (8, 16, 32, 64, 128) if ALL else (16, 64, 128):
            codes = code_plans(layout, uniform, scale.itemsize, tokens, CARDS[arch])
            for code in codes if ALL else codes[:1]:
                arrange, main = code_defines(code, layout, uniform, scale, x)
                yield "arrange", arrange
                yield "code_linear", main
                if has_steps(layout, uniform):
                    yield "steps", form


@pytest.mark.parametrize("arch", CARDS)
def test_every_instance_compiles_without_spills(arch: str) -> None:
    if int(re.sub(r"\D", "", arch)) not in nvrtc.supported_archs():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {arch}")
    seen = set()
    spilled = []
    for name, defines in instances(arch):
        key = (name, tuple(sorted(defines.items())))
        if key in seen:
            continue
        seen.add(key)
        options = [f"--gpu-architecture={arch}", *nvrtc.COMMON_OPTIONS, "--ptxas-options=-v"]
        options += [f"-D{k}={v}" for k, v in defines.items()]
        cubin, log = nvrtc.compile_uncached(nvrtc.source(name), options, f"{name}.cu")
        assert cubin[:4] == b"\x7fELF"
        stores = re.findall(r"(\d+) bytes spill stores", log)
        assert stores, f"no resource report for {name}: {log}"
        if any(int(n) for n in stores):
            spilled.append((name, defines, log[-300:]))
    assert not spilled, f"{len(spilled)} of {len(seen)} spill: {spilled[:3]}"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTRA_CACHE", str(tmp_path))
    return tmp_path


FORM = {"BITS": 2, "GROUP": 128, "UNIFORM": 1, "SCALE_FLOAT": 0, "X_BF16": 0}


def test_cache_keeps_and_repairs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.compile_cubin("dequantize", FORM, "sm_90a")
    (entry,) = (cache / "cubin").glob("*.cubin")
    compiled = []
    real = nvrtc.compile_uncached

    def counted(*args: object) -> tuple[bytes, str]:
        compiled.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(nvrtc, "compile_uncached", counted)
    assert nvrtc.compile_cubin("dequantize", FORM, "sm_90a") == first and not compiled
    for damage in (b"", b"garbage", entry.read_bytes()[:-7], entry.read_bytes() + b"x"):
        entry.write_bytes(damage)
        compiled.clear()
        assert nvrtc.compile_cubin("dequantize", FORM, "sm_90a") == first and len(compiled) == 1
    assert nvrtc.compile_cubin("dequantize", FORM | {"BITS": 3}, "sm_90a") != first
    assert not list((cache / "cubin").glob("*.tmp"))


def test_cache_that_cannot_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvrtc._say_once.cache_clear()
    blocked = cache / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("LUTRA_CACHE", str(blocked))
    assert nvrtc.compile_cubin("dequantize", FORM, "sm_90a")[:4] == b"\x7fELF"
    assert "cannot be used" in caplog.text


def test_many_at_once_compile_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    real = nvrtc.compile_uncached

    def counted(*args: object) -> tuple[bytes, str]:
        compiled.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(nvrtc, "compile_uncached", counted)
    results: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(nvrtc.compile_cubin("dequantize", FORM, "sm_80"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 4 and len(compiled) == 1


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(KernelError, match="undefined"):
        nvrtc.compile_uncached("__global__ void f() { undefined(); }", [], "f.cu")
