"""Loading: what does not fit is refused with the sizes that would, and moving changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import make_model, pack_layers
from quantized import ids, logits, make_source, quantize_tiny

import lutra
from lutra.bench import shapes
from lutra.bench.model import bench_model
from lutra.errors import ResourceError
from lutra.nn import QuantizedLinear
from lutra.runtime import loading, read_ahead
from lutra.scheme import Format

META = torch.device("meta")


def _shape(bits: int) -> torch.nn.Module:
    """Llama-3-8B on the meta device, as `random_model` has it before it takes memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {k: v for k, v in shapes.SHAPES["llama-3-8b"].items() if k != "model_type"}
    with META:
        model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear) and bits < 16:
                packed = QuantizedLinear(
                    module.in_features, module.out_features, Format("bcq", bits, 128)
                )
                model.model.layers.set_submodule(name, packed)
    return model


@pytest.mark.parametrize(
    ("bits", "free", "missing", "advice"),
    [
        (16, 10e9, "needs 16.06 GB .* 10.00 GB left: 6.06 GB are missing", "with 8 bits per"),
        (16, 6e9, "10.06 GB are missing", "with 4 bits per weight or fewer"),
        (4, 4.2e9, "needs 6.14 GB", "with 2 bits"),
        (4, 3.3e9, "needs 6.14 GB", "with 1 bit per"),
        (4, 2e9, "needs 6.14 GB", "2.10 GB are not quantized"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(monkeypatch, bits, free, missing, advice):
    monkeypatch.setattr(loading, "free_bytes", lambda device: int(free))
    model = _shape(bits)
    with pytest.raises(ResourceError, match=missing) as caught:
        loading.check_fits(model, torch.device("cpu"), "the model")
    assert advice in str(caught.value)
    monkeypatch.setattr(loading, "free_bytes", lambda device: 20 * 10**9)
    loading.check_fits(model, torch.device("cpu"), "the model")


def test_bench_refuses_before_it_takes_memory(monkeypatch):
    monkeypatch.setattr(loading, "free_bytes", lambda device: 10**9)
    with pytest.raises(ResourceError, match=r"opt-175b needs .* GB .* missing.*--layers"):
        bench_model("opt-175b", bits=3, group_size=-1)


def test_free_memory_is_known_here():
    free = loading.free_bytes(torch.device("cpu"))
    assert free is None or 10**8 < free < 10**15


def test_a_layer_is_not_prepared_where_it_does_not_stay(tmp_path):
    make_model(tmp_path / "src")
    pack_layers(tmp_path / "src", tmp_path / "out")
    from transformers import AutoModelForCausalLM

    with loading.prepare_later():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert layers and all(layer.choice is None for layer in layers)
    assert logits_of(model).isfinite().all()
    assert all(layer.choice is not None for layer in layers)


class _ToMeta:
    """In place of the pinned buffers: every tensor gets a number on the way."""

    device = META

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def move(self, source: torch.Tensor) -> torch.Tensor:
        self.seen.append(source.clone())
        return source.to(META)


def test_every_tensor_is_moved_once_and_ties_stay() -> None:
    model = torch.nn.Sequential(
        *(torch.nn.Linear(i % 7 + 1, i % 5 + 1).to([torch.float32, torch.float16][i % 2])
          for i in range(200))
    )  # fmt: skip
    model[150].weight = model[3].weight
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    mover, moved = _ToMeta(), {}  # type: ignore[var-annotated]
    for module in model.modules():
        loading._move_tensors(module._parameters, mover, moved)  # type: ignore[arg-type]
    assert len(mover.seen) == 399 and model[150].weight is model[3].weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter.device == META and parameter.dtype == before[name].dtype
        assert parameter.shape == before[name].shape, name
    assert all(old.numel() == 0 for old, _ in moved.values())


class _Late:
    """In place of the pinned buffers: what is moved arrives three tensors later."""

    device = torch.device("cpu", 0)

    def __init__(self) -> None:
        self.submitted = self.sent = 0
        self.under_way: list[tuple[torch.Tensor, torch.Tensor]] = []

    def move(self, source: torch.Tensor) -> torch.Tensor:
        target = torch.zeros_like(source)
        self.under_way.append((target, source.clone()))
        self.submitted += 1
        while len(self.under_way) > 3:
            self._send()
        return target

    def _send(self) -> None:
        target, source = self.under_way.pop(0)
        target.copy_(source)
        self.sent += 1

    def finish(self) -> None:
        while self.under_way:
            self._send()

    def wait(self) -> None:
        pass


def test_moving_prepares_every_layer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    src = make_source(tmp_path / "src", "opt")
    quantize_tiny(src, tmp_path / "out", "rtn", 4)
    here, _ = lutra.load(tmp_path / "out", dtype="float32")
    with loading.prepare_later():
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loading.move(there, torch.device("cpu"))
    layers = [m for m in there.modules() if isinstance(m, QuantizedLinear)]
    assert all(layer.choice is not None for layer in layers)
    assert torch.equal(logits(there), logits(here))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_layers_are_prepared_when_they_are_whole(family: str, tmp_path: Path) -> None:
    """In OPT's blocks k and v come before q, whose rows are the first of the three."""
    from transformers import AutoModelForCausalLM

    src = make_source(tmp_path / "src", family)
    quantize_tiny(src, tmp_path / "out", "rtn", 4)
    here, _ = lutra.load(tmp_path / "out", dtype="float32")
    with loading.prepare_later():
        there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    loading.move_and_prepare(there, _Late())
    layers = [m for m in there.modules() if isinstance(m, QuantizedLinear)]
    assert all(layer.choice is not None for layer in layers)
    joined = [m._is_joined for m in here.modules() if isinstance(m, QuantizedLinear)]
    assert [layer._is_joined for layer in layers] == joined
    assert torch.equal(logits(there), logits(here))


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()[:, :8] % 200).logits  # type: ignore[no-any-return]


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", ["0", "1"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_moving_keeps_every_tensor(
    tmp_path: Path, family: str, pinned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTRA_PINNED_LOAD", pinned)
    src = make_source(tmp_path / "src", family)
    quantize_tiny(src, tmp_path / "out", "rtn", 4)
    here, _ = lutra.load(tmp_path / "out", dtype="float16")
    there, _ = lutra.load(tmp_path / "out", device="cuda", dtype="float16")
    stored = there.state_dict()
    for name, tensor in here.state_dict().items():
        assert stored[name].device.type == "cuda"
        assert torch.equal(stored[name].cpu(), tensor), name
    expected = logits(here)
    with torch.no_grad():
        found = there(ids().cuda()).logits.float().cpu()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_moving_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTRA_PINNED_LOAD", "1")
    import torch.nn as nn

    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(8)))
    model.dtype = torch.float32  # type: ignore[assignment]
    size = loading.model_bytes(model)
    torch.empty(1, device="cuda")
    begin = time.perf_counter()
    loading.move(model, torch.device("cuda", 0))
    torch.cuda.synchronize()
    assert size / (time.perf_counter() - begin) > 2e9


def test_a_group_is_prepared_once_its_last_member_is_there_whatever_the_order():
    prepared: list[str] = []

    class Layer:
        def __init__(self, name: str) -> None:
            self.name, self.siblings = name, None

        def prepare_if_local(self, dtype: torch.dtype) -> None:
            prepared.append(self.name)

    q, k, v, out = (Layer(name) for name in ("q", "k", "v", "out"))
    group = type("Group", (), {"members": lambda self: [q, k, None, v]})()
    q.siblings = k.siblings = v.siblings = group
    mover = type("Mover", (), {"wait": lambda self: None})()
    arrived: set[object] = set()
    for layer, expected in ((k, 0), (v, 0), (out, 1), (q, 4)):
        loading._prepare_when_whole(layer, torch.float16, mover, arrived)
        assert len(prepared) == expected
    assert prepared == ["out", "q", "k", "v"]


def test_files_are_read_ahead_within_the_lead(tmp_path, monkeypatch):
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 1000)
    monkeypatch.setattr(read_ahead, "_is_cached", lambda handle, at, size: False)
    files = [tmp_path / name for name in ("a", "b")]
    for file, size in zip(files, (10_500, 3_001), strict=True):
        file.write_bytes(bytes(size))
    with read_ahead.ReadAhead(files, 4_000) as ahead:
        _wait_until(lambda: ahead.read == 4_000)
        time.sleep(0.05)
        assert ahead.read == 4_000
        ahead.reached(2_500)
        _wait_until(lambda: ahead.read == 7_000)
        ahead.reached(20_000)
        _wait_until(lambda: ahead.read == 13_501)
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_reading_ahead_passes_over_what_is_there_and_what_is_not(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(1 << 16))
    file.read_bytes()
    missing = tmp_path / "b"
    missing.write_bytes(b"x")
    ahead = read_ahead.ReadAhead([file, missing], 1 << 30)
    missing.unlink()
    with ahead:
        for thread in ahead._threads:
            thread.join(10)
    assert ahead.read in (0, 1 << 16)  # not every file system says what is cached


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)
