"""A calibrated run that is killed goes on where it stopped, and gives the same bytes."""

from __future__ import annotations

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

import lutra
from lutra.errors import ResourceError
from lutra.formats.checkpoint import OutputFolder
from lutra.runner.walk import Progress, Recipe, quantize_checkpoint

transformers = pytest.importorskip("transformers")

BLOCKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("resume")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=2,
        vocab_size=300, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = transformers.LlamaForCausalLM(config).state_dict()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    with OutputFolder(folder / "source", "made for a test") as out:
        out.write_shard("all", tensors)
        out.finish(
            {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}, [],
            {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": settings},
        )  # fmt: skip
    (folder / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(2000)))
    return folder / "source"


def _recipe(source: Path, **changes: object) -> Recipe:
    text = source.parent / "text.txt"
    settings = {"calibration": text, "samples": 6, "seq_len": 32, "seed": 1, **changes}
    return Recipe("lut-gemm", 2, 32, options={"rounds": 1}, **settings)  # type: ignore[arg-type]


def _digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(source) -> dict[str, str]:
    """The bytes of a run that nothing disturbed."""
    quantize_checkpoint(source, source.parent / "whole", _recipe(source))
    return _digest(source.parent / "whole")


def test_same_seed_same_bytes(source, whole, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", _recipe(source))
    assert _digest(tmp_path / "out") == whole


@pytest.mark.parametrize("stop_before", range(BLOCKS + 1))
def test_interrupted_at_any_block(source, whole, tmp_path, stop_before):
    def interrupt(step: Progress) -> None:
        if step.done == stop_before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", _recipe(source), on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    quantize_checkpoint(
        source, tmp_path / "out", _recipe(source), on_progress=lambda step: steps.append(step.done)
    )
    assert steps[0] == stop_before  # nothing is done twice
    assert _digest(tmp_path / "out") == whole
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_kill_9_in_the_middle_of_a_block(source, whole, tmp_path):
    script = """
        import os, signal, sys
        from pathlib import Path
        from lutra.formats import output
        from lutra.runner.walk import Recipe, quantize_checkpoint
        source, destination = map(Path, sys.argv[1:])
        real = output.write_shard_file
        def write(path, tensors, metadata=None):
            if path.name == "part-00003.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, tensors, metadata)
        output.write_shard_file = write
        recipe = Recipe("lut-gemm", 2, 32, options={"rounds": 1}, samples=6, seq_len=32, seed=1,
                        calibration=source.parent / "text.txt")
        quantize_checkpoint(source, destination, recipe)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(lutra.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(source), str(tmp_path / "out")],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path / "out").exists()
    steps: list[int] = []
    quantize_checkpoint(
        source, tmp_path / "out", _recipe(source), on_progress=lambda step: steps.append(step.done)
    )
    assert steps[0] == 2  # two blocks were done, the third is done again
    assert _digest(tmp_path / "out") == whole


def test_other_calibration_or_options_do_not_mix(source, tmp_path):
    def interrupt(step: Progress) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "out", _recipe(source), on_progress=interrupt)
    for change, word in [({"seed": 2}, "seed"), ({"samples": 5}, "calibration")]:
        with pytest.raises(ResourceError, match=rf"different run .*{word}"):
            quantize_checkpoint(source, tmp_path / "out", _recipe(source, **change))
    other = source.parent / "other.txt"
    other.write_text("another text, " * 50)
    with pytest.raises(ResourceError, match=r"different run .*calibration"):
        quantize_checkpoint(source, tmp_path / "out", _recipe(source, calibration=other))
