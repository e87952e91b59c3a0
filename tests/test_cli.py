"""The command line: what goes to standard output, exit statuses, and one line for each mistake."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import make_source
from safetensors.torch import load_file, save_file

import lutra
from lutra import cli

Outcome = tuple[int, str, str]
Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit status, standard output, standard error."""

    def here(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lutra", *map(str, arguments)])
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return here


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    return make_source(root / "src")


@pytest.fixture(scope="module")
def quantized(root: Path, source: Path) -> Path:
    from quantized import quantize_tiny

    quantize_tiny(source, root / "quantized", "rtn", 4)
    return root / "quantized"


# ---- --json


def _json(outcome: Outcome) -> Any:
    status, out, err = outcome
    assert status == 0, err
    return json.loads(out)  # nothing else is there


def test_quantize_in_a_process_of_its_own(source, text_file, tmp_path):
    """One JSON object on standard output whatever libraries print; no progress bar in a pipe."""
    result = subprocess.run(
        [
            sys.executable, "-m", "lutra", "quantize", str(source), str(tmp_path / "out"),
            "--bits", "3", "--group-size", "32", "--calibration", str(text_file), "--samples", "4",
            "--seq-len", "32", "--json",
        ],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(lutra.__file__).parents[1])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {"bits_per_weight", "layers", "calibration_cost", "output", "seconds"} <= report.keys()
    assert report["output"] == str(tmp_path / "out")
    assert "\x1b" not in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "out" / "README.md").exists()


def test_quantize_for_people(run, source, text_file, tmp_path):
    status, out, err = run(
        "quantize", source, tmp_path / "out", "--method", "gptq", "--group-size", 32,
        "--calibration", text_file, "--samples", 4, "--seq-len", 32,
    )  # fmt: skip
    assert status == 0 and out == ""
    text = " ".join(err.split())
    assert "bits per weight" in text and "perplexity" in text and "lutra eval" in text


def test_quantize_says_that_a_family_is_unknown(run, tmp_path):
    source = make_source(tmp_path / "src", "stablelm")
    status, _, err = run("quantize", source, tmp_path / "out", "--method", "rtn")
    assert status == 0 and "'stablelm' has no entry" in " ".join(err.split())


def test_eval(run, quantized, source, text_file):
    result = _json(
        run(
            "eval", quantized, "--against", source, "--text", text_file, "--seq-len", 32,
            "--max-windows", 4, "--json",
        )
    )  # fmt: skip
    assert {
        "perplexity", "perplexity_reference", "kl_mean", "kl_p99", "top1_agreement",
        "bits_per_weight", "tokens",
    } <= result.keys()  # fmt: skip
    assert 0 < result["kl_mean"] <= result["kl_p99"] and 4 < result["bits_per_weight"] < 6


def test_inspect(run, quantized):
    result = _json(run("inspect", quantized, "--json"))
    assert {"layers", "bits_per_weight"} <= result.keys() and len(result["layers"]) == 14
    for layer in result["layers"]:
        assert {"name", "format", "bits_per_weight", "kernel", "reason"} <= layer.keys()
    status, out, _ = run("inspect", quantized, "--kernels")
    assert status == 0 and "model.layers.1.mlp.down_proj" in out and "ubcq4g32" in out


def test_methods(run):
    rows = _json(run("methods", "--json"))
    assert {"rtn", "gptq", "awq", "lut-gemm"} <= {row["name"] for row in rows}
    for row in rows:
        assert {"name", "paper", "scope", "needs", "formats"} <= row.keys()
    status, out, _ = run("methods")
    assert status == 0 and "lut-gemm" in out


def test_generate(run, quantized):
    arguments = ("generate", quantized, "--prompt", "Hello", "--max-new-tokens", 5)
    result = _json(run(*arguments, "--json"))
    assert {"text", "tokens_per_second"} <= result.keys()
    status, out, _ = run(*arguments)
    assert status == 0 and result["text"].strip() in out


def test_plan_report_and_version(run, quantized, source, text_file):
    planned = _json(run("plan", source, "--bits", 3, "--json"))
    assert planned["output_bytes"] > 0
    versions = _json(run("version", "--json"))
    assert versions["lutra"] == lutra.__version__
    page = _json(
        run("report", quantized, "--text", text_file, "--seq-len", 32, "--max-windows", 2, "--json")
    )
    assert page["evaluation"]["perplexity"] > 1


def test_bench_kernel(run):
    pytest.importorskip("lutra.bench.kernel")
    result = _json(
        run("bench", "kernel", "--shape", "64x96", "--bits", "2", "--peers", "none", "--json")
    )
    assert result["read_limit_gbps"] > 0
    for row in result["rows"]:
        assert {
            "implementation", "shape", "batch", "bits", "group", "us", "gbps", "speedup_vs_dense",
            "relative_error",
        } <= row.keys()  # fmt: skip


def test_bench_model(run, quantized):
    result = _json(
        run(
            "bench", "model", quantized, "--prompt-len", 4, "--new-tokens", 3, "--repeats", 1,
            "--json",
        )
    )  # fmt: skip
    assert {
        "ms_per_token", "ttft_ms", "tokens_per_second", "memory_gb", "gbps", "read_limit_gbps"
    } <= result.keys()  # fmt: skip


# ---- mistakes


def _one_line(outcome: Outcome, *words: str, status: int = 1) -> None:
    found, out, err = outcome
    text = " ".join(err.split())
    assert found == status, (found, text)
    assert out == "", out
    assert "Traceback" not in text
    if status == 1:
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, err
        text = errors[0]  # the whole message is in that line
    for word in words:
        assert word in text, text


@pytest.fixture
def refused(run: Run, source: Path, text_file: Path, tmp_path: Path) -> Callable[..., None]:
    """Quantizing the source with further arguments fails in one line and leaves nothing behind."""

    def check(*arguments: object, words: tuple[str, ...], status: int = 1, src: object = None):
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        before = sorted(work.iterdir())
        arguments = ("--group-size", 32, "--samples", 2, "--seq-len", 32, *arguments)
        outcome = run("quantize", src or source, work / "out", *arguments, "--json")
        _one_line(outcome, *words, status=status)
        assert sorted(work.iterdir()) == before

    return check


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "rnt"), ("unknown method 'rnt'", "Did you mean rtn?")),
        (("--method", "xyz"), ("unknown method 'xyz'", "rtn, gptq, awq, lut-gemm")),
        (("--method", "rtn", "--set", "clap=search"), ("'clap'", "Did you mean clip?")),
        (("--method", "rtn", "--set", "clip=7"), ("clip", "str", "7")),
        (("--method", "rtn", "--set", "clip"), ("--set", "KEY=VALUE", "'clip'")),
        (("--method", "rtn", "--set", "=3"), ("--set", "KEY=VALUE")),
        (("--method", "rtn", "--set", "format=ubcqq"), ("format", "'ubcqq'")),
        (("--method", "rtn", "--set", "format=bcq"), ("rtn", "ubcq, int", "'bcq'")),
        (("--method", "lut-gemm", "--set", "damping=nan", "--set", "calibrated=false"),
         ("damping", "nan")),
        (("--method", "rtn", "--reconstruct"), ("rtn", "reconstruct")),
        (("--method", "rtn", "--bits", 0), ("bits", "between 1 and 8", "0")),
        (("--method", "rtn", "--bits", 9), ("bits", "between 1 and 8", "9")),
        (("--method", "rtn", "--bits", 17), ("bits", "between 1 and 8", "17")),
        (("--method", "rtn", "--bits", -1), ("bits", "between 1 and 8", "-1")),
        (("--method", "rtn", "--group-size", 33), ("group size", "32", "33")),
        (("--method", "rtn", "--group-size", 0), ("group size", "32", "0")),
        (("--method", "rtn", "--group-size", -2), ("group size", "32", "-2")),
        (("--method", "rtn", "--lm-head-bits", 20), ("bits", "20")),
        (("--method", "rtn", "--lm-head-bits", -3), ("bits", "-3")),
        (("--method", "lut-gemm", "--bits", 3, "--serve-bits", "2,4", "--set", "calibrated=false"),
         ("3-bit", "4 bits")),
        (("--method", "lut-gemm", "--serve-bits", "2;3"), ("--serve-bits", "'2;3'")),
        (("--method", "lut-gemm", "--serve-bits", "junk"), ("--serve-bits", "'junk'")),
        (("--method", "lut-gemm", "--serve-bits", "0", "--set", "calibrated=false"), ("0 bits",)),
        (("--method", "rtn", "--serve-bits", "2"), ("lut-gemm",)),
        (("--method", "gptq"), ("gptq", "--calibration")),
        ((), ("lut-gemm", "--calibration", "calibrated=false")),
        (("--method", "rtn", "--device", "cuda"), ("cuda", "--device cpu")),
        (("--method", "rtn", "--device", "cuda:x"), ("cuda:x",)),
        (("--method", "rtn", "--device", "gpu"), ("gpu", "cpu")),
        (("--method", "rtn", "--device", "meta"), ("meta", "cpu")),
    ],
)  # fmt: skip
def test_options(refused, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    refused(*arguments, words=words)


@pytest.mark.parametrize(
    "arguments",
    [("--bits", "four"), ("--samples", "x"), ("--nonsense",)],
)
def test_usage_errors_of_the_parser(refused, arguments):
    refused(*arguments, words=(str(arguments[0]).strip("-"),), status=2)


def test_calibration_text(refused, tmp_path):
    text = tmp_path / "text.txt"
    gptq = ("--method", "gptq", "--calibration", text)
    refused(*gptq, words=(str(text), "No such file"))
    text.mkdir()
    refused(*gptq, words=(str(text), "directory"))
    text.rmdir()
    text.write_text("")
    refused(*gptq, words=(str(text), "empty"))
    text.write_text("too short")
    refused(*gptq, words=(str(text), "9 tokens", "32", "--seq-len"))
    text.write_bytes(b"caf\xe9 " * 100)
    refused(*gptq, words=(str(text), "not UTF-8", "iconv"))
    text.write_text("long enough, " * 50)
    refused(*gptq, "--samples", 0, words=("--samples", "0"))
    refused(*gptq, "--seq-len", 1, words=("--seq-len", "1"))
    refused(*gptq, "--samples", -4, words=("--samples", "-4"))


def test_sources(refused, quantized, tmp_path, source):
    missing = tmp_path / "missing"
    refused("--method", "rtn", src=missing, words=(str(missing), "does not exist"))
    refused("--method", "rtn", src=source / "config.json", words=("config.json is a file",))
    refused("--method", "rtn", src=quantized, words=(str(quantized), "already quantized"))
    missing.mkdir()
    refused("--method", "rtn", src=missing, words=(str(missing), "config.json"))
    (missing / "config.json").write_text((source / "config.json").read_text())
    refused("--method", "rtn", src=missing, words=(str(missing), "safetensors"))


def _edit(folder: Path, name: str, tensor: torch.Tensor) -> Path:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, name: tensor}, file, {"format": "pt"})
            return file
    raise AssertionError(name)


def test_damaged_sources(refused, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    for value, words in (
        (torch.full((64, 96), torch.nan), (name, "6,144", "NaN")),
        (torch.full((64, 96), -torch.inf), (name, "infinite")),
        (torch.ones(64, 96, dtype=torch.int8), (name, "I8")),
        (torch.ones(64, 96).to(torch.float8_e4m3fn), (name, "F8_E4M3")),
        (torch.ones(63, 96), (name, "[63, 96]", "[64, 96]")),
    ):
        source = make_source(tmp_path / f"src{len(list(tmp_path.iterdir()))}")
        file = _edit(source, name, value)
        refused("--method", "rtn", src=source, words=words)
    size = file.stat().st_size
    os.truncate(file, size - 10)
    refused("--method", "rtn", src=source, words=(file.name, "truncated"))


def test_destination(run, refused, source, tmp_path):
    work = tmp_path / "work"
    (work / "out").mkdir(parents=True)
    refused("--method", "rtn", words=(f"{work / 'out'} already exists",))
    (work / "out").rmdir()
    (work / "out").write_text("a file")
    refused("--method", "rtn", words=(f"{work / 'out'} already exists",))
    (work / "out").unlink()
    (work / "out").symlink_to(work / "nowhere")
    refused("--method", "rtn", words=(f"{work / 'out'} already exists",))
    (work / "out").unlink()
    # A parent that is not there is made; one that is a file can not be.
    status, _, err = run(
        "quantize", source, work / "new" / "er" / "out", "--method", "rtn", "--group-size", 32
    )
    assert status == 0 and (work / "new" / "er" / "out" / "config.json").exists(), err
    (work / "file").write_text("")
    _one_line(run("quantize", source, work / "file" / "out", "--method", "rtn"), str(work / "file"))


def test_destination_without_permission(run, source, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(closed, os.W_OK):  # root may write anywhere
        real = Path.mkdir

        def mkdir(self, *args, **kwargs):
            if closed in self.parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
            real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", mkdir)
    outcome = run("quantize", source, closed / "out", "--method", "rtn", "--group-size", 32)
    _one_line(outcome, str(closed), "Permission denied")
    closed.chmod(stat.S_IRWXU)
    assert list(closed.iterdir()) == []


def test_too_little_disk_is_known_before_the_work(run, source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    _one_line(run("quantize", source, tmp_path / "out", "--method", "rtn"), "free", "out")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_in_the_middle(run, source, tmp_path, monkeypatch):
    arguments = ("quantize", source, tmp_path / "out", "--method", "rtn", "--group-size", 32)
    real, written = os.write, 0

    def write(file: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 40_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        _one_line(run(*arguments), "full", "run the same command again")
    # The finished block stays, to be resumed.
    assert [p.name for p in tmp_path.iterdir()] == [".out.lutra-partial"]
    assert run(*arguments)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- mistakes of the other verbs


@pytest.mark.parametrize("verb", ["inspect", "eval", "generate", "report", "bench model"])
def test_checkpoints_that_can_not_be_read(run, quantized, source, text_file, tmp_path, verb):
    import shutil

    options: dict[str, tuple[object, ...]] = {
        "inspect": (),
        "eval": ("--text", text_file, "--seq-len", 32, "--max-windows", 1),
        "generate": ("--prompt", "a", "--max-new-tokens", 2),
        "report": (),
        "bench model": ("--new-tokens", 2, "--repeats", 1),
    }

    def fails(folder: Path, *words: str) -> None:
        _one_line(run(*verb.split(), folder, *options[verb], "--json"), *words)

    fails(tmp_path / "missing", str(tmp_path / "missing"))
    copy = Path(shutil.copytree(quantized, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    newer = {**config["quantization_config"], "format_version": 99}
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": newer}))
    fails(copy, "99", "Upgrade")
    (copy / "config.json").write_text("{")
    fails(copy, "config.json", "JSON")
    (copy / "config.json").write_text(json.dumps(config))
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    fails(copy, shard.name, "missing")
    if verb in ("inspect", "report"):
        fails(source, "not quantized")


def test_prompts(run, quantized):
    for prompt in ("", "  \n "):
        _one_line(run("generate", quantized, "--prompt", prompt, "--json"), "prompt is empty")
    _one_line(run("generate", quantized, "--prompt", "x" * 300, "--json"), "positions", "128")
    for option, value, word in (
        ("--max-new-tokens", 0, "--max-new-tokens"),
        ("--temperature", -1, "temperature"),
        ("--top-p", 0, "top_p"),
    ):
        _one_line(run("generate", quantized, "--prompt", "a", option, value, "--json"), word)


def test_a_text_that_fills_the_positions_says_so(run, quantized):
    status, _, told = run("generate", quantized, "--prompt", "a", "--max-new-tokens", 500)
    assert status == 0
    assert "500 tokens were asked for" in told


def test_evaluation_texts(run, quantized, tmp_path):
    text = tmp_path / "text.txt"
    _one_line(run("eval", quantized, "--text", text, "--json"), str(text), "No such file")
    text.write_text("short")
    _one_line(run("eval", quantized, "--text", text, "--json"), str(text), "5 tokens")
    _one_line(run("eval", quantized, "--json"), "give a text")


def test_benchmark_options(run):
    pytest.importorskip("lutra.bench.kernel")
    for option, value in (
        ("--shape", "junk"), ("--shape", "12x"), ("--shape", "0x64"), ("--batch", "one"),
        ("--bits", "2,x"), ("--bits", "12"), ("--group-size", "33"), ("--batch", "0"),
        ("--peers", "nobody"), ("--device", "gpu"), ("--threads", "0"),
    ):  # fmt: skip
        arguments = ["--shape", "64x64", "--peers", "none", option, value]
        _one_line(run("bench", "kernel", *arguments, "--json"), value.split(",")[-1])


def test_wrong_verbs(run):
    _one_line(run("quantise"), "quantise", status=2)
    status, out, err = run()
    assert status in (0, 2) and "quantize" in out + err
