"""Plans: sizes as the files will have them, budgets, and runs that can not work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lutra import plan as planning
from lutra.architectures import architecture_of, families
from lutra.errors import CheckpointError, ResourceError, SchemeError
from lutra.formats.checkpoint import OutputFolder, SourceCheckpoint
from lutra.nn import QuantizedLinear
from lutra.plan import available_memory, linears_of, parse_bytes, plan
from lutra.scheme import Format

transformers = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {
    "gpt2": {"n_embd": 96, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64},
    "opt": {
        "hidden_size": 96, "ffn_dim": 136, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 61, "max_position_embeddings": 64, "word_embed_proj_dim": 48,
        "do_layer_norm_before": False,
    },
    "phi3": {**LLAMA, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
}  # fmt: skip


def _checkpoint(path: Path, family: str = "llama", drop: tuple[str, ...] = (), **changes) -> Path:
    config = transformers.AutoConfig.for_model(family, **{**SMALL.get(family, LLAMA), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    with OutputFolder(path, "made for a test") as out:
        tensors = {n: t for n, t in model.state_dict().items() if n not in (*drop, *tied)}
        out.write_shard("all", tensors)
        out.finish(config.to_dict())
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("plan") / "llama")


@pytest.mark.parametrize("family", families())
def test_linears_are_those_of_the_model(tmp_path, family):
    path = _checkpoint(tmp_path / family, family)
    source = SourceCheckpoint.open(path)
    found = linears_of(source, architecture_of(source.config))
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    for linear in found:
        module = model.get_submodule(linear.name)
        out_features = getattr(module, "nf", None) or module.out_features
        in_features = getattr(module, "nx", None) or module.in_features
        assert (linear.out_features, linear.in_features) == (out_features, in_features)
    assert found[-1].block is None and all(x.block is not None for x in found[:-1])
    blocks = model.get_submodule(architecture_of(source.config).blocks)
    assert {x.block for x in found[:-1]} == set(range(len(blocks)))


@pytest.mark.parametrize("kind", ["bcq", "ubcq"])
@pytest.mark.parametrize("head_bits", [0, 4])
def test_sizes_are_exact(llama, kind, head_bits):
    serve = (2,)
    result = plan(llama, "lut-gemm", 3, 64, kind=kind, serve_bits=serve, lm_head_bits=head_bits)
    assert json.loads(json.dumps(result)) == result
    assert len(result["layers"]) == 3 * 7 + bool(head_bits)
    total = 0
    for layer in result["layers"]:
        format = Format.parse(layer["format"])
        module = QuantizedLinear(layer["in_features"], layer["out_features"], format)
        stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        assert layer["bytes"] == stored
        assert layer["bits_per_weight"] == pytest.approx(
            8 * stored / (layer["in_features"] * layer["out_features"])
        )
        total += stored
    source = SourceCheckpoint.open(llama)
    kept = [n for n in source.names() if "proj" not in n and not (head_bits and "lm_head" in n)]
    assert result["kept_bytes"] == sum(source.nbytes(n) for n in kept)
    assert result["output_bytes"] == result["kept_bytes"] + total
    assert result["parameters"] == sum(source.tensor(n).numel() for n in source.names())
    assert result["problems"] == []


def test_tied_head_keeps_the_embedding(tmp_path):
    path = _checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    result = plan(path, "rtn", 4, 64, lm_head_bits=4)
    head = result["layers"][-1]
    assert head["name"] == "lm_head"
    source = SourceCheckpoint.open(path)
    assert result["kept_bytes"] >= source.nbytes("model.embed_tokens.weight")


def test_budget_takes_the_most_bits_that_fit(llama):
    sizes = {bits: plan(llama, "rtn", bits, 64)["run_bytes"] for bits in range(1, 9)}
    assert list(sizes.values()) == sorted(sizes.values())
    for bits, needed in sizes.items():
        exact = plan(llama, "rtn", group_size=64, budget=needed)
        assert exact["bits"] == bits and exact["run_bytes"] == needed
        assert "fit into" in exact["reason"]
    assert plan(llama, "rtn", group_size=64, budget="24GB")["bits"] == 8
    with pytest.raises(ResourceError, match=r"at 1 bit.*--lm-head-bits"):
        plan(llama, "rtn", group_size=64, budget=sizes[1] - 1)


def test_kv_cache_counts(llama):
    short, long = (plan(llama, "rtn", 4, context=c) for c in (0, 1000))
    assert short["kv_cache_bytes"] == 0
    assert long["kv_cache_bytes"] == 2 * 2 * 3 * 2 * 16 * 1000
    assert long["run_bytes"] - short["run_bytes"] == long["kv_cache_bytes"]


def test_unknown_family_is_planned_by_structure(tmp_path):
    path = _checkpoint(tmp_path / "m", "starcoder2", bos_token_id=0, eos_token_id=0)
    result = plan(path, "rtn", 4, 32)
    assert not result["family_known"] and any("starcoder2" in w for w in result["warnings"])
    assert len(result["layers"]) == 3 * 6
    with pytest.raises(SchemeError, match=r"awq needs a family.*starcoder2"):
        plan(path, "awq", 4, 32)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"method": "rnt"}, "unknown method 'rnt'"),
        ({"bits": 9}, "bits must be between 1 and 8"),
        ({"bits": 0}, "bits must be between"),
        ({"group_size": 100}, "multiple of 32"),
        ({"kind": "bcq", "method": "rtn"}, "not 'bcq'"),
        ({"lm_head_bits": 12}, "bits must be between"),
        ({"serve_bits": (4,)}, "can not serve 4 bits"),
        ({"options": {"nope": 1}}, "no option 'nope'"),
        ({"budget": "lots"}, "'lots'"),
        ({"budget": "3 parsecs"}, "24GB"),
    ],
)
def test_wrong_arguments(llama, arguments, word):
    with pytest.raises(SchemeError, match=word):
        plan(llama, **arguments)


def test_missing_tensor_is_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    path = _checkpoint(tmp_path / "m", drop=(name,))
    with pytest.raises(CheckpointError, match=name):
        plan(path, "rtn", 4)


def test_wrong_number_of_blocks_is_named(tmp_path):
    path = _checkpoint(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"model.layers.3.*config.json implies"):
        plan(path, "rtn", 4)


def test_sizes_in_words():
    assert parse_bytes("24GB") == 24 * 10**9 == parse_bytes("24 gb") == parse_bytes(24 * 10**9)
    assert parse_bytes("1.5GiB") == 3 * 2**29
    assert parse_bytes("512") == 512
    for text in ("", "GB", "1 2", "-3GB", "1e9"):
        with pytest.raises(SchemeError):
            parse_bytes(text)


def test_too_little_memory_or_disk_is_a_problem(llama, monkeypatch, tmp_path):
    assert not plan(llama, "gptq", 4)["problems"]
    monkeypatch.setattr(planning, "available_memory", lambda: (10**6, "a test"))
    (problem,) = plan(llama, "gptq", 4)["problems"]
    assert re.search(r"memory and 1.0 MB are there \(a test\).*--samples", problem)
    monkeypatch.setattr(planning, "available_memory", lambda: (None, "unknown"))
    assert not plan(llama, "gptq", 4)["problems"]
    usage = planning.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda place: usage)
    (problem,) = plan(llama, "gptq", 4, dst=tmp_path / "deep" / "er" / "out")["problems"]
    assert re.search(r"disk of .* has 0.0 MB free", problem)


def test_available_memory_is_a_number_with_a_reason():
    available, reason = available_memory()
    assert reason and (available is None or available > 2**20)


def test_calibrated_methods_need_more_memory(llama):
    parts = {m: plan(llama, m, 4)["memory"]["peak_bytes"] for m in ("rtn", "gptq")}
    assert parts["gptq"] > parts["rtn"]
    few = plan(llama, "gptq", 4, samples=8)["memory"]["peak_bytes"]
    assert few < parts["gptq"]
