"""The command line interrupted, killed and started twice: what is done stays done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from quantized import digest, make_source

import lutra
from lutra import cli

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

BLOCKS = 8
TIMEOUT = 600  # seconds, on a busy machine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("resume") / "src", num_hidden_layers=BLOCKS)


def _arguments(source: Path, dst: Path, text: Path) -> list[str]:
    return [
        "quantize", str(source), str(dst), "--calibration", str(text), "--samples", "6",
        "--seq-len", "32", "--bits", "2", "--group-size", "32", "--set", "rounds=1", "--seed", "3",
        "--json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(source: Path, text_file: Path) -> dict[str, str]:
    """The bytes of a run that nothing disturbed, in a process of its own."""
    process = _start(_arguments(source, source.parent / "whole" / "out", text_file))
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert json.loads(out)["seed"] == 3
    return digest(source.parent / "whole" / "out")


def _start(arguments: list[str]) -> subprocess.Popen:
    package = str(Path(lutra.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lutra", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background job, as tests may be, ignores Ctrl-C and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def _blocks_done(dst: Path) -> dict[str, str]:
    """Files of the finished blocks, as the journal has them, by key."""
    journal = dst.parent / f".{dst.name}.lutra-partial" / "progress.json"
    if not journal.exists():
        return {}
    shards = json.loads(journal.read_bytes())["shards"]
    return {s["key"]: s["file"] for s in shards}


def _stop_after(process: subprocess.Popen, dst: Path, blocks: int, number: int) -> dict[str, int]:
    """Send a signal once so many blocks are done; the inode of each file that was done by then."""
    end = time.monotonic() + TIMEOUT
    while len(_blocks_done(dst)) < blocks:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(TIMEOUT) if number != signal.SIGSTOP else None
    model = dst.parent / f".{dst.name}.lutra-partial" / "model"
    return {key: (model / file).stat().st_ino for key, file in _blocks_done(dst).items()}


def test_interrupted_and_killed_it_gives_the_same_bytes(source, whole, text_file, tmp_path):
    dst = tmp_path / "out"
    arguments = _arguments(source, dst, text_file)
    process = _start(arguments)
    first = _stop_after(process, dst, 2, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == ""
    assert "Traceback" not in err and "interrupted" in err and "again" in err
    assert not dst.exists() and 2 <= len(first) < BLOCKS

    process = _start(arguments)
    second = _stop_after(process, dst, len(first) + 2, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not dst.exists() and len(second) < BLOCKS
    assert {k: second[k] for k in first} == first  # not written again

    process = _start(arguments)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert set(json.loads(out)) >= {"bits_per_weight", "layers", "output", "seconds"}
    assert digest(dst) == whole
    inodes = {f.stat().st_ino for f in dst.glob("*.safetensors")}
    assert set(second.values()) <= inodes
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_processes_and_one_destination(source, whole, text_file, tmp_path, capsys, monkeypatch):
    dst = tmp_path / "out"
    arguments = _arguments(source, dst, text_file)
    process = _start(arguments)
    _stop_after(process, dst, 1, signal.SIGSTOP)
    try:
        monkeypatch.setattr(sys, "argv", ["lutra", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        message = " ".join(captured.err.split())
        assert f"another process is writing {dst}" in message and message.count("error:") == 1
    finally:
        process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert digest(dst) == whole


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command here; its exit status and standard error on one line."""

    def here(arguments: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lutra", *arguments])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, " ".join(capsys.readouterr().err.split())

    return here


@pytest.mark.parametrize("stage", ["head", "rest", "finish", "card"])
def test_stopped_near_the_end(source, text_file, tmp_path, monkeypatch, run, stage):
    """Between the last block and the finished folder there are steps too."""
    from lutra.formats.output import OutputFolder

    small = make_source(tmp_path / "small", num_hidden_layers=1)
    tail = ["--samples", "4", "--seq-len", "32", "--lm-head-bits", "4"]
    base = _arguments(small, tmp_path / "whole" / "out", text_file) + tail
    assert run(base)[0] == 0
    arguments = _arguments(small, tmp_path / "out", text_file) + tail
    write, finish = OutputFolder.write_shard, OutputFolder.finish

    def interrupted_write(self, key, *args, **kwargs):
        if key == stage:
            raise KeyboardInterrupt
        write(self, key, *args, **kwargs)

    def interrupted_finish(self, *args, **kwargs):
        if stage == "finish":
            raise KeyboardInterrupt
        return finish(self, *args, **kwargs)

    def interrupted_card(dst, src):
        if stage == "card":
            raise KeyboardInterrupt
        real_card(dst, src)

    real_card = cli._write_card
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "write_shard", interrupted_write)
        patch.setattr(OutputFolder, "finish", interrupted_finish)
        patch.setattr(cli, "_write_card", interrupted_card)
        status, message = run(arguments)
    assert status == 130 and "interrupted" in message
    if stage == "card":  # the folder is complete; only its README.md is not there yet
        assert (tmp_path / "out" / "config.json").exists()
        return
    assert not (tmp_path / "out").exists()
    assert run(arguments)[0] == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole" / "out")


def test_other_options_do_not_mix(source, text_file, tmp_path, monkeypatch, run):
    from lutra.runner.walk import _Walk

    small = make_source(tmp_path / "small")
    arguments = _arguments(small, tmp_path / "out", text_file)
    real = _Walk._block

    def interrupted(self, index, streams):
        if index == 1:
            raise KeyboardInterrupt
        return real(self, index, streams)

    with monkeypatch.context() as patch:
        patch.setattr(_Walk, "_block", interrupted)
        assert run(arguments)[0] == 130
    partial = tmp_path / ".out.lutra-partial"
    before = digest(partial)
    for change, word in (
        (["--bits", "3"], "format"),
        (["--seed", "4"], "seed"),
        (["--set", "damping=0.1"], "options"),
        (["--samples", "5"], "calibration"),
        (["--lm-head-bits", "8"], "head"),
        (["--group-size", "64"], "format"),
    ):
        status, message = run([*arguments, *change])
        assert status == 1 and "different run" in message and word in message
        assert str(partial) in message
    assert digest(partial) == before
    assert run(arguments)[0] == 0
