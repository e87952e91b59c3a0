"""Fixtures: tiny random models of every family, text, and the folder of larger test data.

Nothing is downloaded. The tokenizer has one token a byte, so any text is a test text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 257  # every byte and the end of text; odd, as some real vocabularies are

_LLAMA_LIKE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
# Configs of transformers, by model_type. Tied and untied heads, biases, GQA, q/k norms, serial and
# parallel residuals are all among them.
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"tie_word_embeddings": False, "sliding_window": 32},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 32, "tie_word_embeddings": False},
    "opt": {
        "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "word_embed_proj_dim": 64,
    },
    "gpt_neox": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "phi": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def save_byte_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: byte b is some token of 1 to 256, the end of text is 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((END_OF_TEXT, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "50KB",
    **config: Any,
) -> Path:
    """Write a random model of a family, with its tokenizer, in several shards; return ``folder``.

    A family that is not among TINY_FAMILIES needs its whole config as keywords.

    Norms and biases get random values too: at 1 and 0 they would hide mistakes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = TINY_FAMILIES.get(family, {}) | {
        "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(values | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """``tiny_model("opt", num_hidden_layers=1)``: the folder of a new random model."""

    def make(family: str = "llama", name: str | None = None, **options: Any) -> Path:
        return save_tiny_model(tmp_path / (name or family), family, **options)

    return make


@pytest.fixture(params=sorted(TINY_FAMILIES))
def tiny_model_of_each_family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a random model; the test runs once for every family."""
    return save_tiny_model(tmp_path / request.param, request.param)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 KB of English: the topics of Python's own help."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000], "utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with larger models and texts; tests that need it are skipped without it.

    It lies beside the repository as ``shared``, or where ``LUTRA_SHARED`` says.
    """
    beside = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("LUTRA_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set LUTRA_SHARED)")
    return folder
