"""`lutra bench kernel`: rows, peers that fail, and the plot. Without a GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lutra.bench import cuda, peers_cuda
from lutra.bench.cuda import Candidate, Measured
from lutra.bench.kernel_plot import plot
from lutra.errors import KernelError


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU on which every product takes 100 us / (1 + bits)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(cuda, "read_limit_gbps", lambda _: 1000.0)

    def measure(candidate: Candidate, batches: Any, *_: Any) -> Iterator[Measured]:
        candidate.make()
        for batch in batches:
            yield Measured(batch, 1600 / (17 - candidate.bits) * batch**0.5, 2e-4, 2e-4)

    monkeypatch.setattr(cuda, "_measure", measure)
    monkeypatch.setattr(cuda, "_dense", lambda *_: candidate("cublas", 16))


def candidate(name: str, bits: int, fails: str | None = None) -> Candidate:
    def make() -> Any:
        if fails:
            raise RuntimeError(fails)

    return Candidate(name, bits, 128, 1 << 20, make)


@pytest.mark.usefixtures("fake_card")
def test_a_peer_that_fails_is_named_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda, "_ours", lambda kind, *a: candidate(f"lutra-{kind}", a[2]))
    monkeypatch.setattr(
        cuda, "_peers",
        lambda wanted, o, i, b, *_: [candidate("one", b), candidate("two", b, "no such\nkernel")],
    )  # fmt: skip
    seen: list[dict[str, Any]] = []
    with caplog.at_level(logging.WARNING):
        found = cuda.run([(64, 128), (32, 64)], [1, 4], [2, 3], [128], on_rows=seen.extend)
    assert sorted(map(str, seen)) == sorted(map(str, found["rows"]))
    assert len(found["rows"]) == 2 * 2 * (1 + 2 * 3)
    assert found["left_out"] == [
        {"implementation": "two", "shape": shape, "bits": bits, "reason": "RuntimeError: no such"}
        for shape in ("64x128", "32x64") for bits in (2, 3)
    ]  # fmt: skip
    assert "two fails on 64x128" in caplog.text
    for row in found["rows"]:
        assert math.isclose(row["speedup_vs_dense"], 17 - row["bits"], rel_tol=1e-2) or (
            row["implementation"] == "cublas"
        )
    assert [row["shape"] for row in found["rows"]] == ["64x128"] * 14 + ["32x64"] * 14


@pytest.mark.usefixtures("fake_card")
def test_our_own_failures_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ours", lambda kind, *a: candidate("lutra-bcq", a[2], "broken"))
    with pytest.raises(RuntimeError, match="broken"):
        cuda.run([(64, 128)], [1], [2], [128], peers=False)


def test_without_a_gpu_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="--device cpu"):
        cuda.run([(64, 128)], [1], [2], [128])


def test_peers_that_are_not_installed_or_have_no_such_format_are_no_candidates() -> None:
    device = torch.device("cpu")
    for build in peers_cuda.PEERS.values():
        assert build(64, 100, 7, 100, torch.float16, device) is None


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"implementation": name, "shape": shape, "bits": bits, "batch": batch,
         "speedup_vs_dense": 4 / bits / batch**0.2}
        for name in ("cublas", "lutra-bcq", "lutra-ubcq", "humming-kernels", "some peer")
        for shape in ("4096x4096", "64x128") for bits in (2, 4) for batch in (1, 8, 64)
    ]  # fmt: skip
    plot(rows, tmp_path / "a" / "speed.svg")
    text = (tmp_path / "a" / "speed.svg").read_text()
    assert "<svg" in text and len(text) > 5000
