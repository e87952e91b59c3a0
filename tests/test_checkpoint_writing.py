"""Writing checkpoints: whole or not at all, resumed after any stop, the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from lutra.errors import CheckpointError, LutraError, ResourceError
from lutra.formats import output
from lutra.formats.checkpoint import OutputFolder, SourceCheckpoint

RUN = {"source": "abc", "options": {"method": "rtn", "bits": 3}, "calibration": None}
CONFIG = {"model_type": "llama", "note": "é"}


def _tensors(block: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(block)
    return {
        f"model.layers.{block}.w": torch.randn(4, 6, generator=generator),
        f"model.layers.{block}.b": torch.randn(3, generator=generator).half(),
    }


def _state(block: int) -> dict[str, torch.Tensor]:
    return {"hidden": torch.full((2, 3), float(block), dtype=torch.bfloat16)}


def _write(out: OutputFolder, blocks: range) -> None:
    for block in blocks:
        key = f"block {block}"
        if key not in out.done_keys():
            out.write_shard(key, _tensors(block), {"error": block / 10}, state=_state(block))


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


def _complete(dst: Path, side_files: list[Path] | None = None) -> Path:
    with OutputFolder(dst, RUN) as out:
        _write(out, range(4))
        return out.finish(CONFIG, side_files or [], {"README.md": "card", "x.bin": b"\0\1"})


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- an undisturbed run


def test_complete_run(tmp_path):
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    template = tmp_path / "additional_chat_templates" / "rag.jinja"
    template.parent.mkdir()
    template.write_text("t")
    dst = _complete(tmp_path / "deep" / "out", [side, template])
    assert _names(tmp_path / "deep") == ["out"]
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert _names(dst) == sorted(
        [*shards, "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md",
         "x.bin", "additional_chat_templates"]
    )  # fmt: skip
    assert (dst / "additional_chat_templates" / "rag.jinja").read_text() == "t"
    assert json.loads((dst / "config.json").read_text()) == CONFIG
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (4 * 6 * 4 + 3 * 2)
    read = SourceCheckpoint.open(dst)
    for block in range(4):
        for name, tensor in _tensors(block).items():
            assert torch.equal(read.tensor(name), tensor)
            assert index["weight_map"][name] == shards[block]


def test_same_inputs_give_the_same_bytes(tmp_path):
    assert _digest(_complete(tmp_path / "a")) == _digest(_complete(tmp_path / "b"))


def test_single_shard_needs_no_index(tmp_path):
    with OutputFolder(tmp_path / "out", "run") as out:
        out.write_shard("all", _tensors(0))
        out.finish(CONFIG)
    assert _names(tmp_path / "out") == ["config.json", "model.safetensors"]
    assert SourceCheckpoint.open(tmp_path / "out").names() == sorted(_tensors(0))


def test_transformers_loads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=11, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    with OutputFolder(tmp_path / "out", "run") as out:
        for key in ("layers.0", "layers.1", ""):
            rest = {n: tensors.pop(n) for n in list(tensors) if key in n}
            out.write_shard(key or "rest", rest)
        out.finish({**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_deferred_tensors_are_copied_one_at_a_time(tmp_path):
    source = SourceCheckpoint.open(_complete(tmp_path / "source"))
    names = source.names()
    with OutputFolder(tmp_path / "out", RUN) as out:
        out.write_shard("copied", {n: source.deferred(n) for n in names[:5]})
        mixed = {n: source.tensor(n) if i else source.deferred(n) for i, n in enumerate(names[5:])}
        out.write_shard("mixed", mixed)
        out.finish(CONFIG)
    copied = SourceCheckpoint.open(tmp_path / "out")
    assert copied.names() == names
    assert all(torch.equal(copied.tensor(n), source.tensor(n)) for n in names)


def test_deferred_tensor_that_is_not_finite(tmp_path):
    with OutputFolder(tmp_path / "source", RUN) as out:
        out.write_shard("a", {"bad": torch.tensor([1.0, float("nan")])})
        out.finish(CONFIG)
    source = SourceCheckpoint.open(tmp_path / "source")
    with OutputFolder(tmp_path / "out", RUN) as out, pytest.raises(CheckpointError, match="'bad'"):
        out.write_shard("a", {"bad": source.deferred("bad")})
    assert _names(tmp_path) == ["source"]


def test_mistakes_of_the_caller(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        with pytest.raises(ValueError, match="nothing was written"):
            out.finish(CONFIG)
        out.write_shard("a", _tensors(0))
        with pytest.raises(ValueError, match="'a' is already written"):
            out.write_shard("a", _tensors(1))
        with pytest.raises(ValueError, match="already in shard 'a'"):
            out.write_shard("b", _tensors(0))
        with pytest.raises(ValueError, match="no tensors"):
            out.write_shard("c", {})
        with pytest.raises(ValueError, match="dtype"):
            out.write_shard("d", {"x": torch.zeros(2, dtype=torch.complex64)})
        with pytest.raises(ValueError, match="name has no folder"):
            out.finish(CONFIG, extra={"../README.md": ""})


# ---- what must not be touched


@pytest.mark.parametrize("kind", ["folder", "full folder", "file", "broken link"])
def test_existing_destination(tmp_path, kind):
    dst = tmp_path / "out"
    if kind == "file":
        dst.write_text("mine")
    elif kind == "broken link":
        dst.symlink_to(tmp_path / "nowhere")
    else:
        dst.mkdir()
        if kind == "full folder":
            (dst / "mine").write_text("mine")
    before = _digest(tmp_path)
    with pytest.raises(ResourceError, match=r"out already exists.*Choose another"):
        OutputFolder(dst, RUN)
    assert _digest(tmp_path) == before and _names(tmp_path) == ["out"]


def test_destination_that_appears_meanwhile(tmp_path):
    dst = tmp_path / "out"
    with OutputFolder(dst, RUN) as out:
        _write(out, range(2))
        dst.mkdir()
        with pytest.raises(ResourceError, match="already exists"):
            out.finish(CONFIG)
    assert _names(dst) == []
    dst.rmdir()
    with OutputFolder(dst, RUN) as out:
        assert list(out.done_keys()) == ["block 0", "block 1"]
        out.finish(CONFIG)
    assert SourceCheckpoint.open(dst).names()


def test_two_processes(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        out.write_shard("a", _tensors(0))
        with pytest.raises(ResourceError, match="another process is writing"):
            OutputFolder(tmp_path / "out", RUN)
        out.write_shard("b", _tensors(1))
    with OutputFolder(tmp_path / "out", RUN) as out:
        assert list(out.done_keys()) == ["a", "b"]


def test_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="no locks"):
        _complete(tmp_path / "out")
    assert _names(tmp_path) == ["out"]


def test_file_system_that_can_not_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def sync(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(file)

    monkeypatch.setattr(os, "fsync", sync)
    _complete(tmp_path / "out")


def test_failure_before_the_first_shard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "out", RUN):
        raise RuntimeError("bad input")
    with pytest.raises(ResourceError, match=r"needs 1,000,000\.00 GB more.*free"):
        OutputFolder(tmp_path / "out", RUN, total_bytes=10**15)
    assert _names(tmp_path) == []


def test_parent_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file"):
        OutputFolder(tmp_path / "file" / "out", RUN)


# ---- resuming


def test_resume_gives_the_same_bytes(tmp_path):
    whole = _digest(_complete(tmp_path / "whole"))
    with OutputFolder(tmp_path / "out", RUN) as out:
        _write(out, range(2))
    with OutputFolder(tmp_path / "out", RUN) as out:
        assert out.resumed
        assert out.done_keys() == {"block 0": {"error": 0.0}, "block 1": {"error": 0.1}}
        state = out.load_state("block 1")
        assert state is not None and torch.equal(state["hidden"], _state(1)["hidden"])
        assert out.load_state("block 0") is None  # dropped when block 1 was done
        _write(out, range(4))
        out.finish(CONFIG, [], {"README.md": "card", "x.bin": b"\0\1"})
    assert _digest(tmp_path / "out") == whole
    assert _names(tmp_path) == ["out", "whole"]


def test_state_alone_is_kept_too(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        assert not out.resumed and out.load_state("embeddings / start") is None
        out.save_state("embeddings / start", _state(7))
        out.save_state("other", _state(8))
        out.drop_state("other")
        out.drop_state("never there")
    with OutputFolder(tmp_path / "out", RUN) as out:
        assert out.load_state("other") is None
        state = out.load_state("embeddings / start")
        assert state is not None and torch.equal(state["hidden"], _state(7)["hidden"])


def test_other_run_is_refused(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        _write(out, range(2))
    before = _digest(tmp_path)
    other = {**RUN, "options": {"method": "rtn", "bits": 4}, "seed": 1}
    with pytest.raises(ResourceError) as caught:
        OutputFolder(tmp_path / "out", other)
    message = str(caught.value)
    assert 'options: {"method": "rtn", "bits": 3} then' in message.replace(
        '{"bits": 3, "method": "rtn"}', '{"method": "rtn", "bits": 3}'
    )
    assert "seed: null then, 1 now" in message and "source" not in message
    assert ".out.lutra-partial" in message and "another destination" in message
    assert _digest(tmp_path) == before
    with OutputFolder(tmp_path / "out", RUN) as out:
        assert len(out.done_keys()) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprint": {}}', '{"shards": [1]}'])
def test_damaged_journal(tmp_path, content):
    with OutputFolder(tmp_path / "out", RUN) as out:
        _write(out, range(1))
    (tmp_path / ".out.lutra-partial" / "progress.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"progress.json is damaged. Delete"):
        OutputFolder(tmp_path / "out", RUN)
    assert (tmp_path / ".out.lutra-partial" / "model").is_dir()


def test_finished_shard_that_changed(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        _write(out, range(2))
    part = tmp_path / ".out.lutra-partial" / "model" / "part-00001.safetensors"
    os.truncate(part, 20)
    with pytest.raises(CheckpointError, match=r"part-00001.safetensors.*has changed"):
        OutputFolder(tmp_path / "out", RUN)


def test_damaged_state(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        out.save_state("s", _state(1))
        file = next((tmp_path / ".out.lutra-partial").glob("state-*"))
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="truncated"):
            out.load_state("s")


class _Killed(BaseException):
    """Stands for a process that ends at this very call: nothing after it runs."""


def _calls(monkeypatch, stop_at: int | None) -> list[str]:
    """Count every call that changes the disk, and end at one of them."""
    made: list[str] = []

    def watch(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            if stop_at is not None and len(made) >= stop_at:
                raise _Killed
            made.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("write", "replace", "rename", "fsync"):
        watch(name)
    # A killed process tidies nothing up.
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: made.append("unlink"))
    return made


def _short_run(dst: Path) -> None:
    out = OutputFolder(dst, RUN)
    _write(out, range(2))
    out.finish(CONFIG, [], {"README.md": "card"})


def test_stop_at_every_single_call(tmp_path, monkeypatch):
    """Whatever call a run dies at: DST is absent or complete, and the next run completes it."""
    with monkeypatch.context() as patch:
        calls = _calls(patch, None)
        _short_run(tmp_path / "reference")
        total = len(calls)
    reference = _digest(tmp_path / "reference")
    assert total > 40
    for stop_at in range(total):
        dst = tmp_path / f"out{stop_at}"
        with monkeypatch.context() as patch:
            _calls(patch, stop_at)
            patch.setattr(OutputFolder, "close", lambda self: None)
            out = None
            with pytest.raises(_Killed):
                out = OutputFolder(dst, RUN)
                _write(out, range(2))
                out.finish(CONFIG, [], {"README.md": "card"})
        lock = dst.parent / f".{dst.name}.lutra-partial" / "lock"
        for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
            try:  # the system frees a dead process's lock by closing its files
                if os.path.samefile(f"/proc/self/fd/{number}", lock):
                    os.close(int(number))
            except OSError:
                continue
        if dst.exists():
            assert _digest(dst) == reference, stop_at
            with pytest.raises(ResourceError, match="already exists"):
                OutputFolder(dst, RUN)
            assert not lock.parent.exists()
            continue
        with OutputFolder(dst, RUN) as out:
            done = list(out.done_keys())
            if done:
                assert out.load_state(done[-1]) is not None
            _write(out, range(2))
            out.finish(CONFIG, [], {"README.md": "card"})
        assert _digest(dst) == reference, stop_at


def _run_script(tmp_path: Path, body: str, **options) -> subprocess.CompletedProcess:
    header = """
        import os, sys, signal, resource
        from pathlib import Path
        import torch
        from lutra.errors import LutraError
        from lutra.formats.checkpoint import OutputFolder
        def tensors(i): return {f"t{i}": torch.arange(4000.0) + i}
    """
    script = textwrap.dedent(header) + textwrap.dedent(body)
    source = str(Path(output.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=60, **options,
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_kill_9_loses_the_current_shard_at_most(tmp_path):
    body = """
        out = OutputFolder(sys.argv[1], "run")
        for i in range(3): out.write_shard(f"b{i}", tensors(i), state=tensors(i))
        real = os.write
        def write(file, content):
            done = real(file, bytes(content)[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        os.write = write
        out.write_shard("b3", tensors(3), state=tensors(3))
    """
    assert _run_script(tmp_path, body).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with OutputFolder(tmp_path / "out", "run") as out:
        assert list(out.done_keys()) == ["b0", "b1", "b2"]
        state = out.load_state("b2")
        assert state is not None and torch.equal(state["t2"], torch.arange(4000.0) + 2)
        out.write_shard("b3", {"t3": torch.arange(4000.0) + 3})
        out.finish(CONFIG)
    assert not list((tmp_path / "out").glob("*.tmp"))
    read = SourceCheckpoint.open(tmp_path / "out")
    assert all(torch.equal(read.tensor(f"t{i}"), torch.arange(4000.0) + i) for i in range(4))


# ---- a full disk


def test_file_size_limit_of_the_system(tmp_path):
    """A real refusal by the kernel, of the kind a full disk or quota gives."""
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_FSIZE >= 0
    body = """
        out = OutputFolder(sys.argv[1], "run")
        out.write_shard("b0", tensors(0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))
        try: out.write_shard("b1", tensors(1))
        except LutraError as error: print(error); sys.exit(3)
    """
    result = _run_script(tmp_path, body)
    assert result.returncode == 3, result.stderr
    assert "full" in result.stdout and ".out.lutra-partial" in result.stdout
    assert "1 finished shards are kept" in result.stdout
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    with OutputFolder(tmp_path / "out", "run") as out:
        assert list(out.done_keys()) == ["b0"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("step", ["shard", "state", "finish"])
def test_full_disk(tmp_path, monkeypatch, code, step):
    reference = _digest(_complete(tmp_path / "reference"))
    dst = tmp_path / "out"
    with OutputFolder(dst, RUN) as out:
        _write(out, range(3))
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(code, os.strerror(code))

            patch.setattr(os, "write", full)
            with pytest.raises(ResourceError, match=r"full.*run the same command again"):
                if step == "shard":
                    out.write_shard("block 3", _tensors(3))
                elif step == "state":
                    out.save_state("s", _state(1))
                else:
                    out.finish(CONFIG)
    assert not dst.exists()
    with OutputFolder(dst, RUN) as out:
        assert len(out.done_keys()) == 3
        _write(out, range(4))
        out.finish(CONFIG, [], {"README.md": "card", "x.bin": b"\0\1"})
    assert _digest(dst) == reference


def test_side_file_that_vanished(tmp_path):
    with OutputFolder(tmp_path / "out", RUN) as out:
        _write(out, range(2))
        with pytest.raises(LutraError, match=r"gone.json"):
            out.finish(CONFIG, [tmp_path / "gone.json"])
    assert not (tmp_path / "out").exists()
