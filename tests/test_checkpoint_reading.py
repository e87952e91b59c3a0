"""Reading checkpoints: sound ones byte for byte, and every kind of damage named."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lutra.errors import CheckpointError
from lutra.formats.bitplanes import BitPlanes, pack_bits
from lutra.formats.checkpoint import (
    FORMAT_VERSION,
    SourceCheckpoint,
    check_finite,
    load_layer,
    quantization_config,
    read_quantization_config,
    stored_tensor_shapes,
)
from lutra.formats.grouped import Grouped
from lutra.formats.shard import read_header, read_tensor, write_shard_file
from lutra.nn import QuantizedLinear
from lutra.scheme import Format, Scheme

CONFIG = {"model_type": "llama", "hidden_size": 8, "tie_word_embeddings": False}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "model.embed_tokens.weight": torch.randn(7, 8).bfloat16(),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(8).half(),
        "model.norm.weight": torch.randn(8, dtype=torch.float64),
        "lm_head.weight": torch.randn(7, 8).bfloat16(),
    }


def _folder(path: Path, tensors: dict | None = None, config: dict | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_shard_file(path / "model.safetensors", _tensors() if tensors is None else tensors)
    return path


def _sharded(path: Path, weight_map: dict[str, str] | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = _tensors()
    names = sorted(tensors)
    files = {"a.safetensors": names[:2], "b.safetensors": names[2:]}
    for file, group in files.items():
        save_file({n: tensors[n] for n in group}, path / file)
    weight_map = weight_map or {n: f for f, group in files.items() for n in group}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _refused(path: Path, *words: str, **options) -> str:
    """Opening fails with one error that holds every one of the words."""
    with pytest.raises(CheckpointError) as caught:
        SourceCheckpoint.open(path, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def _raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


# ---- sound checkpoints


@pytest.mark.parametrize("make", [_folder, _sharded])
def test_tensors_come_back_exactly(tmp_path, make):
    source = SourceCheckpoint.open(make(tmp_path / "m"))
    expected = _tensors()
    assert source.names() == sorted(expected)
    assert source.total_bytes() == sum(t.nbytes for t in expected.values())
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert source.nbytes(name) == tensor.nbytes
        assert torch.equal(source.tensor(name), tensor)
        assert torch.equal(source.rows(name, 2, 5), tensor[2:5])
    assert source.rows("lm_head.weight", 3, 3).shape == (0, 8)


def test_tensors_are_copies(tmp_path):
    source = SourceCheckpoint.open(_folder(tmp_path / "m"))
    source.tensor("lm_head.weight").fill_(9)
    assert torch.equal(source.tensor("lm_head.weight"), _tensors()["lm_head.weight"])


def test_empty_and_scalar_tensors(tmp_path):
    tensors = {"a": torch.empty(0, 4), "b": torch.tensor(3.5), "c": torch.empty(3, 0)}
    source = SourceCheckpoint.open(_folder(tmp_path / "m", tensors))
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor)


def test_memory_does_not_grow_with_what_was_read(tmp_path):
    psutil = pytest.importorskip("psutil")
    tensors = {f"t{i}": torch.zeros(1 << 22) for i in range(8)}  # 8 x 16 MiB
    source = SourceCheckpoint.open(_folder(tmp_path / "m", tensors))
    del tensors
    process = psutil.Process()
    source.tensor("t0")
    before = process.memory_info()
    for name in source.names():
        source.tensor(name)
    after = process.memory_info()
    # 128 MiB were read; the allocator may keep a freed tensor or two for the next.
    assert after.rss - before.rss < 56 << 20
    assert after.vms - before.vms < 56 << 20


def test_side_files(tmp_path):
    folder = _sharded(tmp_path / "m")
    kept = [
        "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE",
        "generation_config.json", "NOTICE.md", "additional_chat_templates/rag.jinja",
    ]  # fmt: skip
    (folder / "additional_chat_templates").mkdir()
    left = ["README.md", ".hidden.json", "training.log", "pytorch_model.bin.index.json"]
    for name in [*kept, *left]:
        (folder / name).write_text("x")
    found = SourceCheckpoint.open(folder).side_files()
    assert sorted(str(f.relative_to(folder)) for f in found) == sorted(kept)


def test_names_with_and_without_prefix(tmp_path):
    weight = torch.zeros(2, 2)
    bare = SourceCheckpoint.open(
        _folder(tmp_path / "bare", {"h.0.attn.c_attn.weight": weight, "wte.weight": weight}, {})
    )
    assert bare.resolve("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
    assert bare.resolve("transformer.h.1.attn.c_attn.weight") is None
    assert bare.resolve("lm_head.weight") == "wte.weight" and bare.tied_head

    more = SourceCheckpoint.open(_folder(tmp_path / "more", {"model.decoder.x": weight}, {}))
    assert more.resolve("decoder.x") == "model.decoder.x"

    neox = {"embed_out.weight": weight, "gpt_neox.embed_in.weight": weight}
    source = SourceCheckpoint.open(_folder(tmp_path / "neox", neox, {}))
    assert source.resolve("lm_head.weight") == "embed_out.weight" and not source.tied_head


def test_heads(tmp_path):
    untied = SourceCheckpoint.open(_folder(tmp_path / "untied"))
    assert untied.resolve("lm_head.weight") == "lm_head.weight" and not untied.tied_head
    tensors = _tensors()
    del tensors["lm_head.weight"]
    lacking = SourceCheckpoint.open(_folder(tmp_path / "lacking", tensors))
    assert lacking.resolve("lm_head.weight") is None and not lacking.tied_head
    tied = SourceCheckpoint.open(
        _folder(tmp_path / "tied", tensors, {**CONFIG, "tie_word_embeddings": True})
    )
    assert tied.resolve("lm_head.weight") == "model.embed_tokens.weight" and tied.tied_head
    both = SourceCheckpoint.open(
        _folder(tmp_path / "both", config={**CONFIG, "tie_word_embeddings": True})
    )
    assert both.resolve("lm_head.weight") == "lm_head.weight" and not both.tied_head


def test_buffers_of_old_transformers_are_no_weights(tmp_path):
    tensors = {
        "wte.weight": torch.zeros(2, 2),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "position_ids": torch.arange(4)[None],
    }
    source = SourceCheckpoint.open(_folder(tmp_path / "m", tensors))
    for name, tensor in tensors.items():
        assert torch.equal(source.tensor(name), tensor)


def test_fingerprint(tmp_path):
    folder = _sharded(tmp_path / "m")
    first = SourceCheckpoint.open(folder).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    os.utime(copy / "a.safetensors", (1, 1))
    assert SourceCheckpoint.open(copy).fingerprint() == first
    data = bytearray((copy / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "b.safetensors").write_bytes(data)
    assert SourceCheckpoint.open(copy).fingerprint() != first
    shutil.copy(folder / "b.safetensors", copy)
    assert SourceCheckpoint.open(copy).fingerprint() == first
    (copy / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 9}))
    assert SourceCheckpoint.open(copy).fingerprint() != first


# ---- folders that are no checkpoint


def test_missing_or_wrong_folder(tmp_path):
    _refused(tmp_path / "none", "none", "does not exist")
    (tmp_path / "file").write_text("")
    _refused(tmp_path / "file", "is a file", "folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "empty", "no config.json")
    (tmp_path / "empty" / "x.gguf").write_text("")
    _refused(tmp_path / "empty", "GGUF", "safetensors")
    (tmp_path / "empty" / "config.json").write_text("{}")
    _refused(tmp_path / "empty", "neither model.safetensors nor")
    save_file({"a": torch.zeros(1)}, tmp_path / "empty" / "odd.safetensors")
    _refused(tmp_path / "empty", "odd.safetensors", "no index")


def test_hub_id_when_offline(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    _refused("some/model", "'some/model'", "could not be fetched", "download it elsewhere")  # type: ignore[arg-type]


def test_hub_id_is_fetched(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    folder = _folder(tmp_path / "snapshot")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(folder))
    monkeypatch.chdir(tmp_path)
    assert SourceCheckpoint.open("some/model").path == folder


@pytest.mark.parametrize("text", ["{", "", "[1]", "\xff\xfe", "[" * 100_000])
def test_config_is_not_json(tmp_path, text):
    folder = _folder(tmp_path / "m")
    (folder / "config.json").write_text(text, encoding="latin1")
    _refused(folder, "config.json")


# ---- damaged safetensors files


def test_truncated_file_names_both_sizes(tmp_path):
    folder = _folder(tmp_path / "m")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 5)
    _refused(folder, "model.safetensors", "truncated", f"{size:,}", f"{size - 5:,}")
    os.truncate(file, 30)
    _refused(folder, "model.safetensors", "30", "header")
    os.truncate(file, 3)
    _refused(folder, "model.safetensors", "3 bytes")
    os.truncate(file, 0)
    _refused(folder, "model.safetensors", "0 bytes")


@pytest.mark.parametrize("length", [100_000_001, 2**63 - 1, 2**64 - 1, 5000])
def test_absurd_header_length(tmp_path, length):
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    _refused(folder, "model.safetensors", f"{length:,}")


def test_bytes_after_the_end(tmp_path):
    folder = _folder(tmp_path / "m")
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    _refused(folder, "model.safetensors", "describes only")


def test_lfs_pointer(tmp_path):
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1000\n"
    )
    _refused(folder, "Git LFS pointer", "git lfs pull")


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"\x00\x01", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"1" * 5000, "not valid JSON"),
        (b'{"a": {}, "a": {}}', "'a' stands there twice"),
        ({"__metadata__": 3}, "__metadata__"),
        ({"a": 3}, "'a'"),
        ({"a": {"dtype": "F32"}}, "'a'"),
        ({"a": _entry("F31")}, "unknown dtype 'F31'"),
        ({"a": _entry(["F32"])}, "unknown dtype"),
        ({"a": _entry(shape=(-2,))}, "shape"),
        ({"a": _entry(shape=(True, 2))}, "shape"),
        ({"a": _entry(shape=(2.0,))}, "shape"),
        ({"a": _entry(shape=(10**400,))}, "shape"),
        ({"a": _entry(shape=(2**62,) * 64)}, "needs"),
        ({"a": _entry(shape=(1,) * 70)}, "shape"),
        ({"a": _entry(offsets=(0, 8, 9))}, "data_offsets"),
        ({"a": _entry(offsets=(-8, 0))}, "data_offsets"),
        ({"a": _entry(offsets=(8, 0))}, "needs 8 bytes"),
        ({"a": _entry(shape=(2**40, 2**40))}, "needs"),
        ({"a": _entry(shape=(3,))}, "needs 12 bytes"),
        ({"a": _entry(), "b": _entry()}, "overlaps"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, "overlaps"),
        ({"a": _entry(offsets=(4, 12))}, "leaves a hole"),
        ({"a": _entry(shape=(2**40,), offsets=(0, 2**42))}, "truncated"),
    ],
)
def test_damaged_headers(tmp_path, header, word):
    folder = _folder(tmp_path / "m")
    _raw(folder / "model.safetensors", header, bytes(12))
    _refused(folder, "model.safetensors", word)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_byte_is_read_or_refused(tmp_path_factory, data):
    """Whatever a byte becomes, the header either is sound or is refused with our own error."""
    folder = tmp_path_factory.mktemp("flip")
    tensors = {"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int16)}
    write_shard_file(folder / "x.safetensors", tensors)
    content = bytearray((folder / "x.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 31))] = data.draw(st.integers(0, 255))
    (folder / "x.safetensors").write_bytes(content)
    try:
        header = read_header(folder / "x.safetensors")
        for name, info in header.tensors.items():
            read_tensor(header.path, name, info)
    except CheckpointError as error:
        assert "x.safetensors" in str(error)


def test_file_cut_after_opening(tmp_path):
    folder = _folder(tmp_path / "m")
    source = SourceCheckpoint.open(folder)
    os.truncate(folder / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match=r"truncated.*Did another program"):
        for name in source.names():
            source.tensor(name)


def test_unknown_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        SourceCheckpoint.open(_folder(tmp_path / "m")).tensor("nope")


# ---- indexes


@pytest.mark.parametrize("target", ["../evil", "/etc/passwd", "x/../../evil", "..\\evil", "C:\\x"])
def test_index_pointing_outside(tmp_path, target):
    folder = _sharded(tmp_path / "m", {"a": target})
    save_file({"a": torch.zeros(1)}, tmp_path / "evil")
    _refused(folder, "index.json", repr(target), "outside the folder")


def test_links_out_of_the_folder(tmp_path):
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    _refused(folder, "model.safetensors", "link", "elsewhere.safetensors")

    # A tokenizer is copied into the output, so a link there could publish a private file.
    (folder / "model.safetensors").unlink()
    (tmp_path / "elsewhere.safetensors").rename(folder / "model.safetensors")
    (tmp_path / "secret").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    source = SourceCheckpoint.open(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link"):
        source.side_files()


def test_links_inside_are_followed(tmp_path):
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "real.safetensors")
    (folder / "model.safetensors").symlink_to("real.safetensors")
    assert SourceCheckpoint.open(folder).names()
    (tmp_path / "alias").symlink_to(folder)  # the folder itself may be reached by a link
    assert SourceCheckpoint.open(tmp_path / "alias").names()


def test_links_of_the_hub_cache_are_followed(tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    folder = _folder(repository / "snapshots" / "0123")
    for file in list(folder.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert SourceCheckpoint.open(folder).names() == sorted(_tensors())
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link"):
        SourceCheckpoint.open(folder).side_files()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_instead_of_a_file_does_not_hang(tmp_path):
    folder = _folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    _refused(folder, "not a regular file")


def test_missing_shard(tmp_path):
    folder = _sharded(tmp_path / "m")
    (folder / "b.safetensors").unlink()
    _refused(folder, "b.safetensors", "missing", "3 tensors")


def test_tensor_absent_from_its_shard(tmp_path):
    names = sorted(_tensors())
    places = dict.fromkeys(names[:2], "a.safetensors") | dict.fromkeys(names[2:], "b.safetensors")
    _refused(_sharded(tmp_path / "m", {**places, "ghost": "b.safetensors"}), "'ghost'", "b.safet")
    swapped = {**places, names[0]: "b.safetensors"}
    _refused(_sharded(tmp_path / "n", swapped), repr(names[0]), "it is in a.safetensors")


def test_tensor_in_two_shards(tmp_path):
    folder = _sharded(tmp_path / "m")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    _refused(folder, "both in a.safetensors and in b.safetensors")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "no"])
def test_broken_index(tmp_path, content):
    folder = _sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(content)
    _refused(folder, "model.safetensors.index.json")


# ---- weights that can not be quantized


def test_quantized_sources(tmp_path):
    other = {**CONFIG, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    folder = _folder(tmp_path / "other", config=other)
    _refused(folder, "already quantized", "'gptq'", "original")
    assert SourceCheckpoint.open(folder, quantized=True).names()
    ours = {**CONFIG, "quantization_config": quantization_config(Scheme())}
    _refused(_folder(tmp_path / "ours", config=ours), "already quantized by lutra", "inspect")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("a.weight", "F8_E4M3", (2, 4)),
        ("a.weight_scale_inv", "F8_E8M0", (8,)),
        ("a.weight", "F4", (4, 4)),
        ("a.weight", "C64", (1, 1)),
        ("a.weight", "I8", (2, 4)),
        ("a.weight", "U8", (8, 1)),
        ("a.qweight", "I32", (2, 1)),
        ("a.weight_packed", "I32", (1, 2)),
    ],
)
def test_unsupported_dtypes(tmp_path, name, dtype, shape):
    folder = _folder(tmp_path / "m")
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}
    _raw(folder / "model.safetensors", header, bytes(8))
    _refused(folder, repr(name), dtype, "bfloat16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_not_finite(dtype):
    check_finite("fine", torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype))
    check_finite("empty", torch.empty(0, dtype=dtype))
    check_finite("codes", torch.zeros(3, dtype=torch.int32))
    bad = torch.zeros(3, 4, dtype=dtype)
    bad[1, 2], bad[2, 0], bad[2, 1] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(CheckpointError, match=r"'w' has 3 values.*1 NaN, 2 infinite.*\[1, 2\]"):
        check_finite("w", bad)


def test_all_weights_are_checked(tmp_path):
    SourceCheckpoint.open(_sharded(tmp_path / "fine")).check_weights()
    bad = {**_tensors(), "z": torch.tensor([float("inf")])}
    with pytest.raises(CheckpointError, match="'z' has 1 values"):
        SourceCheckpoint.open(_folder(tmp_path / "bad", bad)).check_weights()


# ---- pickled weights


def _pickled(path: Path, content: object, **options) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.save(content, path / "pytorch_model.bin", **options)
    return path


def test_bin_checkpoint_reads_with_a_warning(tmp_path):
    tensors = _tensors()
    tensors["model.norm.bias"] = torch.arange(16.0)[::2]  # a view with strides
    folder = _pickled(tmp_path / "m", tensors)
    with pytest.warns(UserWarning, match="weights-only"):
        source = SourceCheckpoint.open(folder)
    assert source.names() == sorted(tensors)
    for name, tensor in tensors.items():
        read = source.tensor(name)
        assert torch.equal(read, tensor) and read.is_contiguous()
        assert source.dtype(name) == tensor.dtype and source.nbytes(name) == tensor.nbytes
        assert torch.equal(source.rows(name, 1, 3), tensor[1:3])
    fingerprint = source.fingerprint()
    with pytest.warns(UserWarning):
        assert SourceCheckpoint.open(folder).fingerprint() == fingerprint


def test_sharded_bin_checkpoint(tmp_path):
    folder = _pickled(tmp_path / "m", {"a": torch.ones(2)})
    (folder / "pytorch_model.bin").rename(folder / "p1.bin")
    torch.save({"b": torch.zeros(3)}, folder / "p2.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "p1.bin", "b": "p2.bin"}}))
    with pytest.warns(UserWarning):
        source = SourceCheckpoint.open(folder)
    assert [source.tensor(n).sum() for n in ("a", "b", "a")] == [2, 0, 2]
    index.write_text(json.dumps({"weight_map": {"a": "p1.bin", "b": "../p2.bin"}}))
    _refused(folder, "outside the folder")



@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickles_that_are_more_than_tensors(tmp_path):
    called = tmp_path / "called"

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(called),)

    _refused(_pickled(tmp_path / "evil", {"a": Touch()}), "pytorch_model.bin", "refused")
    assert not called.exists()
    _refused(_pickled(tmp_path / "list", [1, 2]), "not a table of dense tensors")
    sparse = {"a": torch.zeros(2, 2).to_sparse()}
    _refused(_pickled(tmp_path / "sparse", sparse), "pytorch_model.bin")
    old = _pickled(
        tmp_path / "old", {"a": torch.zeros(2)}, _use_new_zipfile_serialization=False
    )
    _refused(old, "pytorch_model.bin", "safetensors")
    torn = _pickled(tmp_path / "torn", {"a": torch.zeros(2000)})
    os.truncate(torn / "pytorch_model.bin", 4000)
    _refused(torn, "pytorch_model.bin", "can not be read")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bin_with_quantized_weights(tmp_path):
    _refused(_pickled(tmp_path / "m", {"a.weight": torch.zeros(2, 2, dtype=torch.int8)}), "I8")


# ---- our own layout


def test_quantization_config_round_trip():
    scheme = Scheme((("lm_head", None), ("model.*", Format.parse("bcq3g128+serve2"))))
    config = {"quantization_config": quantization_config(scheme, method="rtn", seed=0)}
    config = json.loads(json.dumps(config))
    assert read_quantization_config(config) == scheme
    assert read_quantization_config(config["quantization_config"]) == scheme
    assert config["quantization_config"]["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"format_version": FORMAT_VERSION + 1}, "pip install --upgrade lutra"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"format_version": True}, "format_version True"),
        ({"format_version": 0}, "format_version 0"),
        ({"scheme": [["*", "bcq99g128"]]}, "bits must be between"),
        ({"scheme": [["*", "nonsense"]]}, "unknown format 'nonsense'"),
        ({"scheme": None}, "scheme rules"),
    ],
)
def test_wrong_quantization_configs(change, word):
    config = {**quantization_config(Scheme()), **change}
    with pytest.raises(CheckpointError, match=word.replace("(", r"\(")):
        read_quantization_config(config)


def test_config_of_a_plain_model():
    with pytest.raises(CheckpointError, match="not quantized"):
        read_quantization_config(CONFIG)


@pytest.mark.parametrize(
    "name", ["bcq3g32", "ubcq4g64", "int4g32", "bcq1row", "int8row+f32", "bcq4g32+serve2,3"]
)
@pytest.mark.parametrize("in_features", [40, 64, 129])
def test_layer_round_trip(tmp_path, name, in_features):
    format = Format.parse(name)
    shapes = stored_tensor_shapes(format, 5, in_features)
    torch.manual_seed(0)
    tensors = {}
    for suffix, (dtype, shape) in shapes.items():
        if dtype == torch.int32:
            tensors[suffix] = pack_bits(torch.rand(*shape[:2], in_features) > 0.5)
        elif dtype == torch.uint8:
            tensors[suffix] = torch.randint(0, 2**format.bits, shape, dtype=dtype)
        else:
            tensors[suffix] = torch.randn(shape, dtype=dtype)
    # The module that runs the layer has the same parameters.
    module = QuantizedLinear(in_features, 5, format)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in module.state_dict().items()} == shapes

    stored = {f"model.layers.0.q.{suffix}": t for suffix, t in tensors.items()}
    folder = _folder(tmp_path / "m", stored)
    checkpoint = SourceCheckpoint.open(folder, quantized=True)
    layer = load_layer(checkpoint, "model.layers.0.q", format, in_features)
    assert isinstance(layer, Grouped if format.kind == "int" else BitPlanes)
    assert all(torch.equal(t, tensors[suffix]) for suffix, t in layer.tensors().items())
    assert layer.tensors().keys() == tensors.keys()
    assert load_layer(checkpoint, "layers.0.q", format, in_features).in_features == in_features


def test_layers_that_do_not_fit(tmp_path):
    format = Format.parse("bcq2g32")
    stored = {
        "q.weight": torch.zeros(2, 4, 2, dtype=torch.int32),
        "q.weight_scale": torch.zeros(2, 4, 2, dtype=torch.float16),
        "q.weight_offset": torch.zeros(4, 2, dtype=torch.float16),
        "dense.weight": torch.zeros(4, 4),
    }
    checkpoint = SourceCheckpoint.open(_folder(tmp_path / "m", stored), quantized=True)
    load_layer(checkpoint, "q", format, 64)
    for layer, name, inputs, word in [
        ("q", "bcq3g32", 64, r"'q.weight' is torch.int32 \[2, 4, 2\]"),
        ("q", "bcq2g32", 128, "'q.weight'"),
        ("q", "bcq2g64", 64, "'q.weight_scale'"),
        ("q", "bcq2g32+f32", 64, "'q.weight_scale'"),
        ("q", "int2g32", 64, "'q.weight_scale'"),
        ("q", "bcq2g32+serve1", 64, "no tensor 'q.weight_scale_1bit'"),
        ("dense", "bcq2g32", 64, "three dimensions"),
        ("none", "bcq2g32", 64, "no tensor 'none.weight'"),
    ]:
        with pytest.raises(CheckpointError, match=word):
            load_layer(checkpoint, layer, Format.parse(name), inputs)


# ---- writing one file


def test_written_file_is_read_by_the_safetensors_library(tmp_path):
    tensors = {
        **_tensors(), "scalar": torch.tensor(2.0), "empty": torch.empty(0, 3), "é": torch.ones(1),
        "odd": torch.ones(3, dtype=torch.uint8), "bool": torch.tensor([True, False]),
        "strided": torch.arange(12.0).view(3, 4).t(),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    assert write_shard_file(path, tensors) == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert all(
        info.begin % tensors[name].element_size() == 0 for name, info in header.tensors.items()
    )
    first = path.read_bytes()
    write_shard_file(path, dict(reversed(tensors.items())))
    assert path.read_bytes() == first
