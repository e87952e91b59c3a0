"""From a source folder to a finished one: what is stored is what was computed with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    EVERY,
    dense_twin,
    digest,
    logits,
    make_source,
    quantize_tiny,
    recipe,
    tensors_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import lutra
from lutra.errors import CalibrationError, CheckpointError, ResourceError, SchemeError
from lutra.formats.checkpoint import SourceCheckpoint, load_layer
from lutra.methods import methods
from lutra.nn import QuantizedLinear
from lutra.runner.walk import quantize_checkpoint
from lutra.scheme import Format

# Methods that choose for the whole model have tests of their own.
BY_BLOCK = {name: method for name, method in methods().items() if method.scope != "model"}
CASES = [(name, kind) for name, method in BY_BLOCK.items() for kind in method.formats]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("quantize") / "src", dtype=torch.float32)


@pytest.fixture(scope="module")
def original(source: Path) -> Tensor:
    return logits(lutra.load(source)[0])


def _agrees(source: Path, out: Path, report: dict[str, Any], tolerance: float = 1e-4) -> Tensor:
    """Logits of the loaded folder, after comparing them with the dense twin's."""
    expected = logits(dense_twin(source, out, report))
    found = logits(lutra.load(out)[0])
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1)
    return found


def _edit(folder: Path, **changes: Tensor) -> Path:
    """Replace tensors of a folder, whichever shard holds them."""
    left = set(changes)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        mine = left & tensors.keys()
        if mine:
            save_file(tensors | {n: changes[n] for n in mine}, file, {"format": "pt"})
            left -= mine
    assert not left
    return folder


# ---- every method and format


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_method_and_format(source, original, text_file, tmp_path, name, kind):
    report = quantize_tiny(source, tmp_path / "out", name, 4, text=text_file, kind=kind)
    found = _agrees(source, tmp_path / "out", report)
    assert float((found - original).norm() / original.norm()) < 0.35
    assert all(f"{kind}4g32" == facts["format"] for facts in report["layers"].values())
    stored = report["bits_per_weight"]
    assert 4 < stored < (7.5 if kind == "bcq" else 5.5)
    cost = report["calibration_cost"]
    assert 0 < cost["kl_mean"] < 0.5 and cost["perplexity_quantized"] > 1
    assert report["calibration"]["samples"] == 8 and len(report["calibration"]["sha256"]) == 64


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_eight_bits_do_no_harm(source, original, text_file, tmp_path, name, kind):
    report = quantize_tiny(source, tmp_path / "out", name, 8, text=text_file, kind=kind)
    found = _agrees(source, tmp_path / "out", report)
    error = float((found - original).square().sum() / original.square().sum())
    assert error < 1e-4, error
    assert report["calibration_cost"]["kl_mean"] < 1e-3


def test_the_walker_computes_with_what_it_stores(source, text_file, tmp_path):
    """The cost in the report is that of the loaded folder, to rounding."""
    from transformers import AutoTokenizer

    from lutra.runner.calibrate import calibration_windows

    report = quantize_tiny(source, tmp_path / "out", "lut-gemm", 2, text=text_file, lm_head_bits=3)
    windows = calibration_windows(AutoTokenizer.from_pretrained(source), text_file, 8, 32, 0)
    cost = report["calibration_cost"]
    for key, folder in (
        ("perplexity_original", source),
        ("perplexity_quantized", tmp_path / "out"),
    ):
        model, _ = lutra.load(folder)
        with torch.no_grad():
            loss = model(windows.ids_NT, labels=windows.ids_NT).loss
        assert abs(cost[key] / float(loss.exp()) - 1) < 1e-3


def test_better_methods_are_better(source, original, text_file, tmp_path):
    error = {}
    for name in ("rtn", "gptq", "lut-gemm"):
        report = quantize_tiny(
            source, tmp_path / name, name, 2, text=text_file, samples=32, seq_len=64, options={}
        )
        error[name] = report["calibration_cost"]["kl_mean"]
    assert error["lut-gemm"] < error["gptq"] < error["rtn"]


def test_weights_alone(source, original, tmp_path):
    report = quantize_tiny(source, tmp_path / "out", "lut-gemm", 4, kind="bcq")
    found = _agrees(source, tmp_path / "out", report)
    assert float((found - original).norm() / original.norm()) < 0.3
    assert report["calibration"] is None and report["calibration_cost"] is None
    assert {facts["error_of"] for facts in report["layers"].values()} == {"weight"}


# ---- the same again


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lut-gemm", {"reconstruct": True, "steps": 3, "batch": 2, "rounds": 1}),
        ("lut-gemm", {"follow_original": True, "rounds": 1}),
        ("awq", {"grid": 5}),
    ],
)
def test_the_same_seed_gives_the_same_bytes(source, text_file, tmp_path, name, options):
    runs = []
    for run in ("a", "b"):
        quantize_tiny(source, tmp_path / run / "out", name, 3, text=text_file, options=options)
        runs.append(digest(tmp_path / run / "out"))
    assert runs[0] == runs[1]
    quantize_tiny(source, tmp_path / "c", name, 3, text=text_file, options=options, seed=1)
    third = digest(tmp_path / "c")
    assert third["model-00001-of-00003.safetensors"] != runs[0]["model-00001-of-00003.safetensors"]


def test_the_source_folder_does_not_change(tmp_path, text_file):
    source = make_source(tmp_path / "src")
    before = digest(source)
    quantize_tiny(source, tmp_path / "out", "awq", 3, text=text_file)
    assert digest(source) == before


# ---- heads


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("tied", [True, False])
def test_heads_of_every_family(tmp_path, family, tied):
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    source = make_source(tmp_path / "src", family, tie_word_embeddings=tied, **{layers: 1})
    report = quantize_tiny(source, tmp_path / "out", "rtn", 8, lm_head_bits=8)
    assert "lm_head" in report["layers"]
    found = _agrees(source, tmp_path / "out", report)
    expected = logits(lutra.load(source)[0])
    assert float((found - expected).norm() / expected.norm()) < 0.03
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    stored = tensors_of(tmp_path / "out")
    # The embedding stays as it was; an untied head is there once only.
    dense = [n for n, t in stored.items() if t.shape[0] == 257 and t.dim() == 2]
    assert len([n for n in dense if "weight_" not in n]) == 1


# ---- unusual and sound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_the_source(tmp_path, text_file, dtype):
    source = make_source(tmp_path / "src", dtype=dtype)
    report = quantize_tiny(source, tmp_path / "out", "gptq", 6, text=text_file)
    found = _agrees(source, tmp_path / "out", report)
    expected = logits(lutra.load(source)[0])
    assert float((found - expected).norm() / expected.norm()) < 0.1
    stored = tensors_of(tmp_path / "out")
    assert stored["model.norm.weight"].dtype == dtype


@pytest.mark.parametrize("shard", ["1KB", "1GB"])
def test_shards_of_any_size(tmp_path, source, shard):
    copy = make_source(tmp_path / "src", dtype=torch.float32, max_shard_size=shard)
    files = len(list(copy.glob("*.safetensors")))
    assert files == 1 if shard == "1GB" else files > 10
    quantize_tiny(copy, tmp_path / "one", "rtn", 3)
    quantize_tiny(source, tmp_path / "two", "rtn", 3)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", BY_BLOCK)
def test_odd_shapes_and_one_layer(tmp_path, text_file, name):
    """Inputs that no group size divides, an odd number of outputs, a single block."""
    source = make_source(
        tmp_path / "src", hidden_size=36, intermediate_size=77, num_attention_heads=3,
        num_key_value_heads=1, head_dim=10, num_hidden_layers=1,
    )  # fmt: skip
    report = quantize_tiny(
        source, tmp_path / "out", name, 3, text=text_file, group_size=64, lm_head_bits=5
    )
    _agrees(source, tmp_path / "out", report)
    assert len(report["layers"]) == 8


def test_one_group_per_row(source, original, text_file, tmp_path):
    report = quantize_tiny(source, tmp_path / "out", "gptq", 4, text=text_file, group_size=-1)
    assert {f["format"] for f in report["layers"].values()} == {"ubcq4row"}
    _agrees(source, tmp_path / "out", report)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_unusual_weights(tmp_path, text_file, name, kind):
    """A dead channel, all-zero rows, a constant matrix, and one enormous weight."""
    source = make_source(tmp_path / "src", dtype=torch.float32)
    tensors = tensors_of(source)
    up = tensors["model.layers.0.mlp.up_proj.weight"].clone()
    up[3] = 0  # a channel of down_proj's input is dead
    up[10:20] = 0
    value = tensors["model.layers.1.self_attn.v_proj.weight"].clone()
    value[5, 6] = 1e6
    norm = tensors["model.layers.1.input_layernorm.weight"].clone()
    norm[8] = 0
    changes = {
        "model.layers.0.mlp.up_proj.weight": up,
        "model.layers.1.self_attn.v_proj.weight": value,
        "model.layers.1.input_layernorm.weight": norm,
        "model.layers.1.mlp.gate_proj.weight": torch.full_like(up, 0.02),
        "model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 64),
    }
    _edit(source, **changes)
    report = quantize_tiny(source, tmp_path / "out", name, 4, text=text_file, kind=kind)
    _agrees(source, tmp_path / "out", report, 1e-3)  # activations of 1e6 beside those of 1
    layer = "model.layers.1.self_attn.v_proj"
    facts = report["layers"][layer]
    out = SourceCheckpoint.open(tmp_path / "out", quantized=True)
    dense = load_layer(out, layer, Format.parse(facts["format"]), 64).unpack()
    if name != "awq":  # which rescales channels
        assert facts["format"] == f"{kind}4g32+f32"
        assert abs(float(dense[5, 6]) / 1e6 - 1) < 0.05
        rest = [i for i in range(len(value)) if i != 5]
        assert float((dense[rest] - value[rest]).norm() / value[rest].norm()) < 0.3
    zero = load_layer(out, "model.layers.0.self_attn.o_proj", Format(kind, 4, 32), 64).unpack()
    assert zero.abs().max() < 1e-6
    constant = load_layer(out, "model.layers.1.mlp.gate_proj", Format(kind, 4, 32), 64).unpack()
    if name != "awq":
        assert (constant - 0.02).abs().max() < 0.003


def test_text_shorter_than_asked_for(source, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("just enough for two windows of tokens, " * 2)
    report = quantize_tiny(source, tmp_path / "out", "gptq", 3, text=text, samples=100)
    assert report["calibration"]["samples"] == 2
    _agrees(source, tmp_path / "out", report)


def test_windows_longer_than_the_model(source, text_file, tmp_path):
    report = quantize_tiny(source, tmp_path / "out", "gptq", 3, text=text_file, seq_len=4096)
    assert report["calibration"]["seq_len"] == 128


def test_experts_are_refused_with_a_reason(tmp_path):
    source = make_source_of_experts(tmp_path / "src")
    with pytest.raises(CheckpointError, match="mixtures of experts"):
        quantize_tiny(source, tmp_path / "out", "rtn", 4)
    assert not (tmp_path / "out").exists()


def make_source_of_experts(folder: Path) -> Path:
    from conftest import save_tiny_model

    return save_tiny_model(
        folder, "mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2,
        max_position_embeddings=128,
    )  # fmt: skip


# ---- wrong


def test_methods_that_need_the_structure_refuse_unknown_families(tmp_path, text_file):
    source = make_source(tmp_path / "src", "stablelm")
    with pytest.raises(SchemeError, match="awq.*'stablelm'.*rtn, gptq and lut-gemm"):
        quantize_tiny(source, tmp_path / "out", "awq", 4, text=text_file)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bits": 0}, SchemeError, "between 1 and 8, not 0"),
        ({"bits": 9}, SchemeError, "between 1 and 8, not 9"),
        ({"group_size": 33}, SchemeError, "multiple of 32.*33"),
        ({"group_size": 0}, SchemeError, "multiple of 32.*0"),
        ({"lm_head_bits": 20}, SchemeError, "between 1 and 8, not 20"),
        ({"method": "gptqq"}, SchemeError, "Did you mean gptq"),
        ({"kind": "int"}, SchemeError, "ubcq, bcq, not 'int'"),
        ({"method": "gptq"}, CalibrationError, "needs calibration text"),
        ({"options": {"calibrate": False}}, SchemeError, "Did you mean calibrated"),
    ],
)
def test_wrong_recipes(source, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        quantize_tiny(source, tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_devices_that_are_not_there(source, tmp_path):
    for device, error in (("cuda:7", ResourceError), ("tpu9", SchemeError)):
        with pytest.raises(error, match=device):
            quantize_checkpoint(source, tmp_path / "out", recipe("rtn"), device)
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow(tmp_path, text_file):
    source = make_source(tmp_path / "src", dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    _edit(source, **{name: torch.full_like(tensors_of(source)[name], 3e38)})
    with pytest.raises((CheckpointError, CalibrationError), match="not finite"):
        quantize_tiny(source, tmp_path / "out", "gptq", 4, text=text_file)
    assert not (tmp_path / "out").exists()


def test_layers_by_name(source, tmp_path):
    report = quantize_tiny(source, tmp_path / "out", "rtn", 4)
    model, _ = lutra.load(tmp_path / "out")
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert packed == set(report["layers"]) and len(packed) == 14
    assert "model.embed_tokens" not in packed and "lm_head" not in packed

@pytest.mark.parametrize("head_bits", [0, 4])
def test_one_table_stored_as_the_head_serves_as_embedding_too(tmp_path, head_bits):
    usual = make_source(tmp_path / "usual")
    other = tmp_path / "other"
    shutil.copytree(usual, other)
    tensors = tensors_of(other)
    for file in (*other.glob("*.safetensors"), other / "model.safetensors.index.json"):
        file.unlink()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    options = {"method": "rtn", "bits": 4, "lm_head_bits": head_bits}
    for src in (usual, other):
        quantize_tiny(src, tmp_path / f"{src.name}-out", **options)
    written = [tensors_of(tmp_path / f"{name}-out") for name in ("usual", "other")]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(t, written[1][name]) for name, t in written[0].items())
