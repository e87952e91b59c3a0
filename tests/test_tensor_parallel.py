"""Two processes with a part of the model each give the tokens of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from quantized import make_source, quantize_tiny

import lutra
import lutra.nn
from lutra.errors import ResourceError, SchemeError
from lutra.integrations import tensor_parallel
from lutra.scheme import Format, Scheme

_RANK = """
    import json, sys
    import torch
    import torch.distributed as dist
    from lutra.integrations.tensor_parallel import load_parallel, start
    from lutra.nn import QuantizedLinear
    from lutra.runtime import generation
    rank, ranks = start()
    results = {}
    for folder in sys.argv[2:]:
        model = load_parallel(folder, "cpu", torch.float32)
        held = sum(t.numel() * t.element_size() for m in model.modules()
                   if isinstance(m, QuantizedLinear) for t in m.state_dict().values())
        ids = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
        generation.enable(model, devices=("cpu",))
        stepped = model.generate(ids, max_new_tokens=8, do_sample=False)
        joined = sum(m._is_joined for m in model.modules() if isinstance(m, QuantizedLinear))
        assert list(model.lutra_decoding.steps.values())[0].fallback is None
        results[folder] = {"logits": logits.tolist(), "tokens": tokens.tolist(), "held": held,
                           "stepped": stepped.tolist(), "joined": joined}
    json.dump(results, open(f"{sys.argv[1]}/{rank}.json", "w"))
    dist.destroy_process_group()
"""
# A bias in every layer, one scale per row, groups, a dense layer among packed ones.
_PLANS = {
    "llama": {"bits": 3, "group_size": 32, "lm_head_bits": 4},
    "opt": {"bits": 3, "group_size": -1},
    "qwen3": {"bits": 4, "group_size": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parallel")
    made = {}
    for family, plan in _PLANS.items():
        wide = {"ffn_dim": 128} if family == "opt" else {"intermediate_size": 128}
        src = make_source(root / family / "src", family, **wide)
        quantize_tiny(src, root / family / "out", "rtn", **plan)
        made[family] = root / family / "out"
    made["dense"] = make_source(root / "dense", "llama", intermediate_size=128)
    return made


def test_two_ranks_give_the_tokens_of_one(folders, tmp_path):
    (tmp_path / "rank.py").write_text(textwrap.dedent(_RANK))
    environment = os.environ | {
        "PYTHONPATH": str(Path(lutra.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "WORLD_SIZE": "2",
    }  # fmt: skip
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, *map(str, folders.values())],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-3000:]
    first, second = (json.loads((tmp_path / f"{r}.json").read_text()) for r in range(2))
    ids = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(0))
    for family, folder in folders.items():
        model, _ = lutra.load(folder)
        with torch.no_grad():
            logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
        for found in (first[str(folder)], second[str(folder)]):
            assert torch.allclose(torch.tensor(found["logits"]), logits, atol=2e-3), family
            assert found["tokens"] == found["stepped"] == tokens, family
        if family != "dense":
            whole = sum(
                t.numel() * t.element_size() for m in model.modules()
                if isinstance(m, lutra.nn.QuantizedLinear) for t in m.state_dict().values()
            )  # fmt: skip
            head = 257 * 64 * 4 / 8 * 1.4 if family == "llama" else 0
            assert first[str(folder)]["held"] < 0.56 * whole + head
            assert first[str(folder)]["joined"] == 2 * (3 if family == "opt" else 5)


def _config(**changes):
    from transformers import LlamaConfig

    values = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 1,
    }  # fmt: skip
    return LlamaConfig(**(values | changes))


def _scheme(name: str) -> Scheme:
    return Scheme((("model.layers.*", Format.parse(name)),))


@pytest.mark.parametrize(
    ("changes", "name", "ranks", "words"),
    [
        ({}, "bcq3g128", 3, "32 attention heads.*over 1, 2, 4, 8"),
        ({}, "bcq3g128", 16, "8 key and value heads.*1, 2, 4, 8"),
        ({}, "bcq3g4096", 8, "groups of 4096.*over 1\\.$"),
        ({"intermediate_size": 14368}, "bcq3g128", 2, "down_proj.*no multiple of 32.*over 1\\."),
        ({"intermediate_size": 11008}, "bcq3g128", 4, "in groups of 128.*1, 2\\."),
    ],
)
def test_degrees_that_do_not_divide_are_refused(changes, name, ranks, words):
    with pytest.raises(SchemeError, match=words):
        tensor_parallel.check_degree(_config(**changes), _scheme(name), ranks)


def test_one_scale_per_row_is_cut_anywhere():
    config = _config(intermediate_size=11008)
    assert tensor_parallel.degrees(config, _scheme("bcq3row")) == [1, 2, 4, 8]
    assert tensor_parallel.degrees(config, None) == [1, 2, 4, 8]


def test_other_families_are_refused():
    from transformers import GPT2Config

    with pytest.raises(SchemeError, match="'gpt2' has no plan"):
        tensor_parallel.check_degree(GPT2Config(), None, 2)


def test_processes_of_their_own_are_needed(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ResourceError, match="torchrun"):
        tensor_parallel.start()
