"""Bad input on the command line: one message, exit status 1, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lutra import cli
from lutra.formats.checkpoint import FORMAT_VERSION, OutputFolder

transformers = pytest.importorskip("transformers")

CONFIG = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
BROKEN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A sound tiny Llama in several shards, with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = tmp_path_factory.mktemp("source") / "tiny"
    config = transformers.LlamaConfig(**CONFIG)
    torch.manual_seed(0)
    tensors = transformers.LlamaForCausalLM(config).state_dict()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    extra = {
        "tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)
    }  # fmt: skip
    with OutputFolder(path, "made for a test") as out:
        for part in ("layers.0", "layers.1", ""):
            rest = {n: tensors.pop(n) for n in list(tensors) if part in n}
            out.write_shard(part or "rest", rest)
        out.finish({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, [], extra)
    return path


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "src"))


def _lutra(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Run a command in this process; its exit status and standard error."""
    monkeypatch.setattr(sys, "argv", ["lutra", *map(str, arguments)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setenv("COLUMNS", "1000")
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    return status, capsys.readouterr().err


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Quantizing to ``out`` fails with one error that holds all words, and leaves nothing."""

    def check(*arguments: object, words: tuple[str, ...], kept: bool = False) -> str:
        before = set(tmp_path.iterdir())
        status, message = _lutra(monkeypatch, capsys, "quantize", *arguments)
        text = " ".join(message.split())
        assert status == 1, text
        assert text.count("error:") == 1 and "Traceback" not in text
        for word in words:
            assert word in text, text
        new = {p.name for p in set(tmp_path.iterdir()) - before}
        assert new == ({".out.lutra-partial"} if kept else set())
        return text

    return check


def _rtn(source: Path, tmp_path: Path) -> tuple[object, ...]:
    return source, tmp_path / "out", "--method", "rtn", "--group-size", 32


def _damage_shard(path: Path, **changes: torch.Tensor) -> None:
    file = path / "model-00002-of-00003.safetensors"
    save_file({**load_file(file), **changes}, file)


def test_sound_input_works(monkeypatch, capsys, source, tmp_path):
    status, message = _lutra(monkeypatch, capsys, "quantize", *_rtn(source, tmp_path))
    assert status == 0, message
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_truncated_shard(fails, copy, tmp_path):
    file = copy / "model-00002-of-00003.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    fails(*_rtn(copy, tmp_path), words=(file.name, "truncated", f"{size:,}", f"{size - 100:,}"))


def test_absurd_header_length(fails, copy, tmp_path):
    file = copy / "model-00001-of-00003.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    fails(*_rtn(copy, tmp_path), words=(file.name, "header", f"{2**60:,}"))


def test_header_that_is_no_json(fails, copy, tmp_path):
    file = copy / "model-00001-of-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"x" * 12
    file.write_bytes(content)
    fails(*_rtn(copy, tmp_path), words=(file.name, "not valid JSON"))


def test_index_that_points_outside(fails, copy, tmp_path):
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00003", "../model-00003"))
    fails(*_rtn(copy, tmp_path), words=("index.json", "outside the folder"))


def test_missing_shard(fails, copy, tmp_path):
    (copy / "model-00003-of-00003.safetensors").unlink()
    fails(*_rtn(copy, tmp_path), words=("model-00003-of-00003.safetensors is missing",))


def test_config_that_is_no_json(fails, copy, tmp_path):
    (copy / "config.json").write_text("{")
    fails(*_rtn(copy, tmp_path), words=("config.json is not valid JSON",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(fails, copy, tmp_path, value):
    weight = torch.ones(32, 40)
    weight[3, 5] = value
    _damage_shard(copy, **{BROKEN: weight})
    fails(*_rtn(copy, tmp_path), words=(BROKEN, "1 values", "[3, 5]"))


def test_unsupported_dtype(fails, copy, tmp_path):
    _damage_shard(copy, **{BROKEN: torch.ones(32, 40, dtype=torch.int8)})
    fails(*_rtn(copy, tmp_path), words=(BROKEN, "I8", "bfloat16"))


def test_shape_that_the_config_denies(fails, copy, tmp_path):
    _damage_shard(copy, **{BROKEN: torch.ones(32, 39)})
    fails(*_rtn(copy, tmp_path), words=(BROKEN, "[32, 39]", "[32, 40]"))


def test_source_that_is_quantized(monkeypatch, capsys, fails, source, tmp_path):
    status, _ = _lutra(monkeypatch, capsys, "quantize", *_rtn(source, tmp_path))
    assert status == 0
    fails(tmp_path / "out", tmp_path / "again", "--method", "rtn", words=("already quantized",))


def test_tensor_that_is_missing(fails, copy, tmp_path):
    index = copy / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"].pop(BROKEN)
    index.write_text(json.dumps(table))
    file = copy / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    tensors.pop(BROKEN)
    save_file(tensors, file)
    fails(*_rtn(copy, tmp_path), words=(BROKEN, "Is a shard missing?"))


def test_pickle_that_runs_code(fails, copy, tmp_path):
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    called = tmp_path / "called"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(called),)

    torch.save({"a": Evil()}, copy / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="weights-only"):
        fails(*_rtn(copy, tmp_path), words=("pytorch_model.bin", "refused"))
    assert not called.exists()


def test_existing_destination(fails, source, tmp_path):
    (tmp_path / "out").mkdir()
    fails(*_rtn(source, tmp_path), words=("already exists",))
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_and_then_room(monkeypatch, capsys, fails, source, tmp_path):
    real = os.write
    written = 0

    def write(file: int, data: bytes) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        fails(
            *_rtn(source, tmp_path), words=("full", ".out.lutra-partial", "run the same"), kept=True
        )
    status, message = _lutra(monkeypatch, capsys, "quantize", *_rtn(source, tmp_path))
    assert status == 0, message
    assert not (tmp_path / ".out.lutra-partial").exists()


def test_too_little_memory(monkeypatch, fails, source, tmp_path):
    from lutra.runner import walk

    def too_large(*_, **__):
        return torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(walk, "quantization_config", too_large)
    fails(*_rtn(source, tmp_path), words=("out of memory", "lutra plan"), kept=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "rnt"), ("unknown method 'rnt'", "rtn")),
        (("--method", "rtn", "--set", "clap=search"), ("no option 'clap'", "clip")),
        (("--method", "rtn", "--set", "clip=7"), ("clip",)),
        (("--method", "rtn", "--bits", "9"), ("bits", "9")),
        (("--method", "rtn", "--bits", "0"), ("bits", "0")),
        (("--method", "rtn", "--group-size", "48"), ("group size", "48")),
        (("--method", "gptq",), ("calibration",)),
    ],
)
def test_wrong_options(fails, source, tmp_path, arguments, words):
    fails(source, tmp_path / "out", *arguments, words=words)


def test_calibration_text(fails, source, tmp_path):
    text = tmp_path / "text.txt"
    gptq = (source, tmp_path / "out", "--method", "gptq", "--calibration", text, "--seq-len", 32)
    fails(*gptq, words=("text.txt", "No such file"))
    text.write_text("too short")
    fails(*gptq, words=("text.txt", "9 tokens", "32"))
    text.write_bytes(b"\xff\xfe\xfa" * 100)
    fails(*gptq, words=("text.txt", "UTF-8"))


def test_newer_format_version(monkeypatch, capsys, source, tmp_path):
    status, _ = _lutra(monkeypatch, capsys, "quantize", *_rtn(source, tmp_path))
    assert status == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for verb in (["inspect"], ["generate", "--prompt", "a"]):
        status, message = _lutra(monkeypatch, capsys, verb[0], tmp_path / "out", *verb[1:])
        assert status == 1 and message.count("error:") == 1
        assert f"format version {FORMAT_VERSION + 1}" in " ".join(message.split())
