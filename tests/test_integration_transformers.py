"""What transformers does with our folders, in processes with lutra and in ones without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    EVERY,
    FAMILIES,
    UNKNOWN,
    dense_twin,
    digest,
    ids,
    logits,
    make_source,
    quantize_tiny,
    tensors_of,
)
from safetensors.torch import load_file, save_file

import lutra
from lutra.errors import CheckpointError, SchemeError
from lutra.formats.checkpoint import FORMAT_VERSION
from lutra.nn import QuantizedLinear

# One method for each family, so that every method and format meets several of them.
_PLANS: dict[str, dict[str, Any]] = {
    family: [
        {"method": "lut-gemm", "bits": 3, "options": {"rounds": 1}},
        {"method": "lut-gemm", "bits": 2, "kind": "bcq", "lm_head_bits": 4},
        {"method": "gptq", "bits": 4, "kind": "int"},
        {"method": "awq" if family in FAMILIES else "rtn", "bits": 3, "lm_head_bits": 8},
    ][number % 4]
    for number, family in enumerate(EVERY)
}

_SECOND_PROCESS = """
    import json, sys, warnings
    from pathlib import Path
    import lutra
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    done = {}
    for out in sorted(folder.glob("*/out")):
        expected = load_file(out.parent / "expected.safetensors")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        facts = {"packed": sum(type(m).__name__ == "QuantizedLinear" for m in model.modules())}
        with torch.no_grad():
            facts["error"] = float((model(expected["ids"]).logits - expected["logits"]).abs().max())
            text = model.generate(expected["ids"][:, :8], max_new_tokens=4, do_sample=False)
            facts["new_tokens"] = text.shape[1] - 8
        model.save_pretrained(out.parent / "saved")
        AutoTokenizer.from_pretrained(out).save_pretrained(out.parent / "saved")
        dense = model.dequantize()
        facts["packed_after"] = sum(type(m).__name__ == "QuantizedLinear" for m in dense.modules())
        with torch.no_grad():
            facts["dense_error"] = float(
                (dense(expected["ids"]).logits - expected["logits"]).abs().max()
            )
        base = AutoModel.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            hidden = base(expected["ids"]).last_hidden_state
        facts["base_error"] = float((hidden - expected["hidden"]).abs().max())
        facts["base_packed"] = sum(type(m).__name__ == "QuantizedLinear" for m in base.modules())
        done[out.parent.name] = facts
    print(json.dumps(done))
"""

_WITHOUT_LUTRA = """
    import json, sys
    from pathlib import Path
    sys.modules["lutra"] = None  # as if it were not installed
    from transformers import AutoModelForCausalLM
    answers = {}
    for out in sorted(Path(sys.argv[1]).glob("*/out")):
        try:
            AutoModelForCausalLM.from_pretrained(out)
        except Exception as error:
            answers[out.parent.name] = f"{type(error).__name__}: {error}"
        else:
            answers[out.parent.name] = "loaded"
    print(json.dumps(answers))
"""


def _python(script: str, *arguments: Path, lutra_there: bool = True) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if lutra_there:
        environment["PYTHONPATH"] = str(Path(lutra.__file__).parents[1])
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=arguments[0],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """``FAMILY/src`` and ``FAMILY/out`` for every family, and what the output must compute."""
    root = tmp_path_factory.mktemp("families")
    for family, plan in _PLANS.items():
        src = make_source(root / family / "src", family)
        report = quantize_tiny(src, root / family / "out", text=text_file, **plan)
        assert report["family_known"] == (family in FAMILIES)
        twin = dense_twin(src, root / family / "out", report)
        with torch.no_grad():
            hidden = twin.base_model(ids()).last_hidden_state
        expected = {"ids": ids(), "logits": logits(twin), "hidden": hidden}
        save_file(expected, root / family / "expected.safetensors")
    return root


@pytest.fixture(scope="module")
def second_process(folder: Path) -> dict[str, dict[str, Any]]:
    result = _python(_SECOND_PROCESS, folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", EVERY)
def test_second_process_computes_what_is_stored(folder, second_process, family):
    facts = second_process[family]
    report = json.loads((folder / family / "out" / "lutra_report.json").read_text())
    reach = float(load_file(folder / family / "expected.safetensors")["logits"].abs().max())
    head = "lm_head" in report["layers"]
    assert facts["packed"] == len(report["layers"]) > 0
    assert facts["error"] < 1e-4 * max(reach, 1)
    assert facts["new_tokens"] == 4
    assert facts["packed_after"] == 0 and facts["dense_error"] < 1e-4 * max(reach, 1)
    assert facts["base_packed"] == len(report["layers"]) - head and facts["base_error"] < 1e-3


@pytest.mark.parametrize("family", EVERY)
def test_saving_gives_the_same_bits(folder, second_process, family):
    out, saved = (tensors_of(folder / family / name) for name in ("out", "saved"))
    # Old names (GPT-NeoX's embed_out) may change; a tied head may be left out.
    for name in sorted(out.keys() & saved.keys()):
        if saved[name].dtype == torch.float32 and out[name].dtype != torch.float32:
            assert torch.equal(saved[name], out[name].float()), name  # loaded as float32
        else:
            assert saved[name].dtype == out[name].dtype and torch.equal(saved[name], out[name])
    packed = {name for name in out if out[name].dtype == torch.int32}
    assert packed and packed <= saved.keys()
    config = json.loads((folder / family / "saved" / "config.json").read_text())
    original = json.loads((folder / family / "out" / "config.json").read_text())
    assert config["quantization_config"] == original["quantization_config"]
    model, _ = lutra.load(folder / family / "saved")
    expected = load_file(folder / family / "expected.safetensors")["logits"]
    assert (logits(model) - expected).abs().max() < 1e-4 * max(expected.abs().max(), 1)


def test_without_lutra_it_is_an_error_and_never_garbage(folder):
    result = _python(_WITHOUT_LUTRA, folder, lutra_there=False)
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers.keys() == EVERY.keys()
    for family, answer in answers.items():
        assert "mismatch" in answer or "size" in answer or "shape" in answer, (family, answer)


@pytest.mark.parametrize("family", UNKNOWN)
def test_cost_of_an_unknown_family_is_what_its_own_forward_says(folder, text_file, family):
    """Caps, multipliers and norms behind the blocks are not in the table for these."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lutra.runner.calibrate import calibration_windows

    report = json.loads((folder / family / "out" / "lutra_report.json").read_text())
    src = folder / family / "src"
    windows = calibration_windows(AutoTokenizer.from_pretrained(src), text_file, 8, 32, 0).ids_NT
    cost = report["calibration_cost"]
    twin = dense_twin(src, folder / family / "out", report)
    original = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32).eval()
    for key, model in (("perplexity_original", original), ("perplexity_quantized", twin)):
        with torch.no_grad():
            nll = model(windows, labels=windows).loss
        assert abs(cost[key] / float(nll.exp()) - 1) < 2e-3


# ---- in this process


@pytest.fixture
def llama(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "llama" / "out", tmp_path / "out"))


def _shard_with(folder: Path, suffix: str) -> tuple[Path, str]:
    for file in sorted(folder.glob("*.safetensors")):
        for name in load_file(file):
            if name.endswith(suffix):
                return file, name
    raise AssertionError(suffix)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_offset", "down_proj.weight"])
def test_missing_tensors_are_errors(llama, suffix):
    from transformers import AutoModelForCausalLM

    file, name = _shard_with(llama, suffix)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    index = llama / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][name]
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=name):
        AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(CheckpointError, match=name):
        lutra.load(llama)


def test_missing_shard_is_an_error(llama):
    from transformers import AutoModelForCausalLM

    file, _ = _shard_with(llama, "down_proj.weight")
    file.unlink()
    with pytest.raises(Exception, match=file.name):
        AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        lutra.load(llama)


def test_newer_versions_are_refused(llama):
    from transformers import AutoModelForCausalLM

    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (llama / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM.from_pretrained, lutra.load):
        with pytest.raises(CheckpointError, match=f"format version {FORMAT_VERSION + 1}"):
            load(llama)


def test_a_scheme_that_does_not_fit_the_tensors(llama):
    config = json.loads((llama / "config.json").read_text())
    rules = config["quantization_config"]["scheme"]
    config["quantization_config"]["scheme"] = [[p, f and "ubcq4g32"] for p, f in rules]
    (llama / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        lutra.load(llama)


def test_scales_keep_their_dtype_when_the_model_is_cast(llama):
    model, _ = lutra.load(llama)
    expected = logits(model)
    model = model.to(torch.bfloat16).to(torch.float32)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.stored().scale.dtype == layer.format.scale_dtype
    assert (logits(model) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_of_activations(llama, dtype):
    model, tokenizer = lutra.load(llama, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert logits(model).isfinite().all()
    assert tokenizer("abc")["input_ids"]


def test_precisions_that_are_not_there(llama):
    with pytest.raises(SchemeError, match="2 bits|not 2"):
        lutra.load(llama, bits=2)
    dense = make_source(llama.parent / "dense")
    with pytest.raises(SchemeError, match="none|no bits"):
        lutra.load(dense, bits=2)


def test_quantizing_on_load_is_refused(folder):
    """Weights are quantized by `lutra quantize`; a dense folder with our config is an error."""
    from transformers import AutoModelForCausalLM

    from lutra.integrations.transformers import LutraConfig

    source = folder / "llama" / "src"
    with pytest.raises(Exception, match="calibrat|quantiz|no tensor"):
        AutoModelForCausalLM.from_pretrained(
            source, quantization_config=LutraConfig(scheme=[["model.layers.*", "ubcq3g32"]])
        )


def test_import_of_lutra_after_transformers(folder):
    script = """
        import sys
        from transformers import AutoModelForCausalLM
        import lutra
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/llama/out")
        print(sum(type(m).__name__ == "QuantizedLinear" for m in model.modules()))
    """
    result = _python(script, folder)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == "14"


def test_import_is_light():
    script = """
        import sys, lutra
        heavy = {"torch", "transformers", "matplotlib", "typer", "rich"} & sys.modules.keys()
        print(sorted(heavy))
    """
    result = _python(script, Path.cwd())
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_folders_are_complete(folder):
    out = folder / "llama" / "out"
    names = set(digest(out))
    assert {"config.json", "lutra_report.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "generation_config.json" in names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl", ".tmp"))]
