"""`lutra bench model`: shapes of every family, batches and lengths, and the profile of a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lutra.bench import model as bench
from lutra.bench.profile import part_of, plot, summarize
from lutra.bench.shapes import SHAPES, random_model
from lutra.errors import SchemeError
from lutra.nn import QuantizedLinear
from lutra.nn_flat import FlatLinear
from lutra.scheme import Format

_SMALL: dict[str, dict[str, Any]] = {
    "llama-3-8b": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                   "num_key_value_heads": 2},
    "qwen3-8b": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 32},
    "opt-175b": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256,
                 "num_attention_heads": 4},
}  # fmt: skip


@pytest.fixture(params=sorted(_SMALL))
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a shape of some family, made small."""
    small = SHAPES[request.param] | _SMALL[request.param]
    monkeypatch.setitem(SHAPES, "small", small | {"num_hidden_layers": 2, "vocab_size": 90})
    return "small"


def test_rows_profile_and_one_scale_per_row(shape):
    result = bench.bench_model(
        shape, bits=3, group_size=-1, kind="ubcq", head_bits=4, prompt_len=[4, 8], batch=[1, 3],
        new_tokens=2, repeats=1, threads=1, profile=True,
    )  # fmt: skip
    assert result["format"] == "ubcq3row, head ubcq4row" and result["threads"] == 1
    where = [(row["prompt_len"], row["batch"]) for row in result["rows"]]
    assert where == [(4, 1), (4, 3), (8, 1), (8, 3)]
    assert (result["prompt_len"], result["batch"]) == (4, 1)
    for row in result["rows"]:
        assert row["ms_per_token"] > 0 and row["ttft_ms"] > 0 and row["gbps"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1000 / row["ms_per_token"])
    profile = result["profile"]
    assert sum(profile["parts"].values()) == pytest.approx(profile["token_us"], rel=0.05)
    assert 0 < profile["share_not_linear"] < 1
    assert {"linear", "attention", "norms"} <= profile["parts"].keys()


def test_weights_are_random_and_results_finite(shape):
    model, total = random_model(shape, Format.parse("bcq3g32"), "cpu", "float32", 1)
    assert total == 2
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert layers and all(len(layer.weight.unique()) > 10 for layer in layers)
    assert all(len(layer.weight_scale.unique()) > 10 for layer in layers)
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_flattened_integers(shape, bits):
    result = bench.bench_model(
        shape, bits=bits, kind="flat", prompt_len=4, new_tokens=2, repeats=1, threads=1
    )
    assert result["format"] == f"flat{bits}" and result["ms_per_token"] > 0
    model, _ = random_model(shape, Format("flat", bits), "cpu", "float32", 1)
    layers = [m for m in model.modules() if isinstance(m, FlatLinear)]
    assert layers and all(len(layer.input_limit.unique()) == 2 for layer in layers)
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0.01


def test_options_that_can_not_work():
    for options in ({"batch": 0}, {"prompt_len": []}, {"threads": 0}):
        with pytest.raises(SchemeError, match="at least 1"):
            bench.bench_model("opt-125m", **options)


def test_parts_of_overlapping_kernels_add_up_to_the_token():
    events = [
        (0.0, 10.0, "binary_linear"),
        (8.0, 13.0, "token_norm"),  # starts while the first drains
        (9.0, 12.0, "token_activation"),  # hidden
        (15.0, 19.0, "nvjet_sm90_tst"),
    ]
    found = summarize(events, 1)
    assert found["token_us"] == 19
    assert found["parts"] == {"linear": 14, "norms": 3, "gaps": 2, "activation": 0}
    assert found["share_not_linear"] == pytest.approx(5 / 19)
    assert found["kernels"][0] == {
        "name": "binary_linear", "part": "linear", "calls": 1, "us": 10,
    }  # fmt: skip
    assert summarize([], 1)["token_us"] == 0


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("field_linear", "linear"), ("code_batch", "linear"), ("prefill_arrange", "linear"),
        ("place_batch", "linear"),
        ("flat_few", "linear"), ("void cublasLt::splitKreduce_kernel<32>", "linear"),
        ("token_attention", "attention"), ("ncclDevKernel_AllReduce_Sum_f16", "communication"),
        ("void at::native::(anonymous namespace)::indexSelectSmallIndex", "other"),
    ],
)  # fmt: skip
def test_kernels_by_name(kernel, part):
    assert part_of(kernel) == part


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = summarize([(0.0, 7.0, "binary_linear"), (8.0, 9.0, "token_norm")], 1)
    plot({"one": found, "two": found}, tmp_path / "sub" / "profile.svg")
    assert (tmp_path / "sub" / "profile.svg").stat().st_size > 1000
