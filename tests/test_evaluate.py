"""Evaluation: perplexity and divergence against slow references, size, errors, tasks, generate."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import make_model, pack_layers
from safetensors.torch import load_file, save_file

from lutra.errors import CalibrationError, CheckpointError, LutraError, ResourceError, SchemeError
from lutra.evaluate import evaluate, measure_size
from lutra.evaluate import perplexity as perplexity_module
from lutra.evaluate.divergence import divergence, quantile
from lutra.evaluate.measure import compare, default_batch_size
from lutra.evaluate.perplexity import (
    choose_seq_len,
    cut_windows,
    mean_and_error,
    read_text,
    token_nll,
)
from lutra.evaluate.tasks import find_task, load_tasks, read_task
from lutra.formats.bitplanes import BitPlanes
from lutra.generate import generate
from lutra.nn import QuantizedLinear
from lutra.scheme import Format

WORDS = "the otter swims in cold clear water and sleeps on its back holding a stone ".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "otter")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(WORDS * 12) + "\nÜber Otter\n")
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# ---- perplexity and divergence


def test_perplexity_equals_a_loop_over_tokens(folder: Path, text: Path) -> None:
    result = evaluate(folder, text=text, seq_len=24, max_windows=5)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)
    model = load(folder)
    losses = []
    for window in range(5):
        part = torch.tensor(ids["input_ids"][24 * window : 24 * window + 24])
        with torch.no_grad():
            logits = model(part[None]).logits[0].double()
        for position in range(1, 24):
            losses.append(-logits[position - 1].log_softmax(-1)[part[position]].item())
    assert result["tokens"] == len(losses) == 5 * 23
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert result["perplexity_reference"] is None and result["kl_mean"] is None
    assert result["bits_per_weight"] == 16
    assert json.loads(json.dumps(result)) == result


def test_seq_len_defaults_to_the_model_positions(folder: Path, text: Path) -> None:
    assert evaluate(folder, text=text, max_windows=1)["seq_len"] == 64
    assert choose_seq_len(None, 131072) == 2048
    assert choose_seq_len(None, None) == 2048
    with pytest.raises(SchemeError, match="64 positions"):
        evaluate(folder, text=text, seq_len=65)
    with pytest.raises(SchemeError, match="at least 2"):
        choose_seq_len(1, None)


def test_batches_and_slices_change_nothing(
    folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = evaluate(folder, text=text, against=folder, seq_len=16, max_windows=7, batch_size=1)
    monkeypatch.setattr(perplexity_module, "_SLICE_BYTES", 257 * 4 * 4)  # 4 rows of logits
    many = evaluate(folder, text=text, against=folder, seq_len=16, max_windows=7, batch_size=4)
    assert many["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert many["kl_mean"] == one["kl_mean"] == 0 and many["kl_max"] == 0
    assert many["top1_agreement"] == one["top1_agreement"] == 1
    assert many["perplexity_reference"] == many["perplexity"]
    assert many["log_perplexity_ratio"] == 0


def test_divergence_equals_the_definition() -> None:
    torch.manual_seed(1)
    p, q = torch.randn(2, 9, 33), torch.randn(2, 9, 33)
    kl, same = divergence(p, q)
    p64, q64 = p[:, :-1].double().softmax(-1), q[:, :-1].double().softmax(-1)
    expected = (p64 * (p64 / q64).log()).sum(-1)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(same, p[:, :-1].argmax(-1) == q[:, :-1].argmax(-1))


def test_divergence_with_excluded_tokens_is_a_number() -> None:
    p, q = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    p[..., 5] = q[..., 5] = -torch.inf
    kl, _ = divergence(p, q)
    keep = [0, 1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(kl, divergence(p[..., keep], q[..., keep])[0])


def test_a_quantized_model_in_memory(folder: Path, text: Path) -> None:
    """Layers exchanged for packed ones: figures equal those of the model with unpacked weights."""
    packed_model, dense_model, original = load(folder), load(folder), load(folder)
    format = Format("ubcq", 4, 64)
    for name, module in list(packed_model.named_modules()):
        if name.endswith("_proj"):
            weight = module.weight.data
            zero = torch.full((weight.shape[0], -(-weight.shape[1] // 64)), 8.0)
            step = torch.full_like(zero, 0.06)
            codes = (weight / 0.06 + 8).round().clamp(0, 15).to(torch.int64)
            planes = BitPlanes.from_uniform(codes, step, zero, 4, 64)
            packed_model.set_submodule(name, QuantizedLinear.from_weight(planes, format))
            dense_model.get_submodule(name).weight.data = planes.unpack()
    from transformers import AutoTokenizer

    windows = cut_windows(text, AutoTokenizer.from_pretrained(folder), 257, 32)
    ours = compare(packed_model, windows, original, batch_size=2)
    dense = compare(dense_model, windows, original, batch_size=2)
    torch.testing.assert_close(ours.nll_WN, dense.nll_WN, rtol=1e-3, atol=1e-3)
    assert ours.kl_WN is not None and dense.kl_WN is not None
    torch.testing.assert_close(ours.kl_WN, dense.kl_WN, rtol=1e-2, atol=1e-3)
    assert ours.kl_WN.mean() > 1e-4


def test_mean_error_and_quantiles() -> None:
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3 and error == pytest.approx(math.sqrt(14 / 3) / 2)
    assert mean_and_error(torch.tensor([1.0]))[1] is None
    values = torch.rand(1001)
    for q in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert quantile(values, q) == pytest.approx(values.double().quantile(q).item())


def test_default_batch_is_bounded() -> None:
    assert default_batch_size(2048, 128256) == 1
    assert default_batch_size(16, 257) == 8


def test_joining(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes("\ufeffa\r\nb\r".encode())
    assert read_text(path)[0] == "a\nb\n"
    assert read_text(path, "blank-lines")[0] == "a\n\nb\n\n"
    with pytest.raises(SchemeError, match="blank-lines"):
        read_text(path, "spaces")


# ---- what is wrong is said


def test_text_errors(folder: Path, tmp_path: Path) -> None:
    empty, latin, short = (tmp_path / name for name in ("empty.txt", "latin.txt", "short.txt"))
    empty.write_text(" \n")
    latin.write_bytes(b"caf\xe9 au lait" * 20)
    short.write_text("too short")
    with pytest.raises(CalibrationError, match="empty.txt is empty"):
        evaluate(folder, text=empty)
    with pytest.raises(CalibrationError, match="latin.txt is not UTF-8: byte 0xe9 at position 3"):
        evaluate(folder, text=latin)
    with pytest.raises(CalibrationError, match="9 tokens, less than one window of 64"):
        evaluate(folder, text=short)
    with pytest.raises(CalibrationError, match=r"nowhere.txt can not be read"):
        evaluate(folder, text=tmp_path / "nowhere.txt")
    with pytest.raises(CalibrationError, match="nothing to measure"):
        evaluate(folder)
    with pytest.raises(SchemeError, match="max_windows"):
        evaluate(folder, text=latin, max_windows=0)
    for options, problem in (
        ({"dtype": "float8"}, "float8"), ({"device": "gpu"}, "'gpu' is no device"),
        ({"batch_size": 0}, "batch-size"),
    ):  # fmt: skip
        with pytest.raises(SchemeError, match=problem):
            evaluate(folder, text=short, **options)
    with pytest.raises(SchemeError, match="give --text together with --against"):
        evaluate(folder, against=folder, tasks=["quiz"], tasks_dir=tmp_path)
    with pytest.raises(ResourceError, match="no device cuda:99"):
        evaluate(folder, text=short, device="cuda:99")


def test_model_errors(folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(tmp_path / "nowhere", text=text)

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer"):
        evaluate(bare, text=text)

    broken = make_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"broken gives NaN .* window 0"):
        evaluate(broken, text=text)
    with pytest.raises(CheckpointError, match=r"broken gives NaN"):
        evaluate(folder, text=text, against=broken)

    wider = make_model(tmp_path / "wider", vocab_size=300)
    with pytest.raises(CheckpointError, match="300 tokens and the quantized model 257"):
        evaluate(folder, text=text, against=wider, seq_len=16)
    narrow = make_model(tmp_path / "narrow", vocab_size=100)
    with pytest.raises(CheckpointError, match="belong to another model"):
        evaluate(narrow, text=text)

    other = make_model(tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match="tokenizer of .*other differs"):
        evaluate(folder, text=text, against=other)


def test_verbs_stay_verbs_once_their_modules_are_imported(folder: Path, text: Path) -> None:
    import lutra

    for _ in range(2):
        assert lutra.evaluate(folder, text=text, max_windows=1)["windows"] == 1
        assert lutra.generate(folder, "x", 1)["new_tokens"] == 1


# ---- size


@pytest.mark.parametrize(("kind", "bits"), [("ubcq", 3), ("int", 2)])
def test_bits_per_weight_from_headers(folder: Path, tmp_path: Path, kind: str, bits: int) -> None:
    dst = tmp_path / "packed"
    packed = pack_layers(folder, dst, kind, bits)
    size = measure_size(dst)
    assert [layer.name for layer in size.layers] == sorted(packed)
    for layer in size.layers:
        weight = packed[layer.name]
        assert layer.bits_per_weight == pytest.approx(weight.bits_per_weight())
        assert (layer.out_features, layer.in_features) == (
            weight.out_features, weight.in_features
        )  # fmt: skip
        assert layer.format == f"{kind}{bits}g64"
    stored = sum(8 * layer.stored_bytes for layer in size.layers)
    weights = sum(layer.weights for layer in size.layers)
    assert size.bits_per_weight == pytest.approx(stored / weights)
    assert size.parameters == sum(
        t.numel() for t in load_file(folder / "model.safetensors").values()
    )
    assert size.size_bytes < (dst / "model.safetensors").stat().st_size < size.size_bytes + 8000
    # The same with the shapes noted beside the weights, and an error where they can not be.
    facts = {"layers": {name: {"in_features": w.in_features} for name, w in packed.items()}}
    (dst / "lutra_report.json").write_text(json.dumps(facts))
    assert measure_size(dst) == size
    facts["layers"]["model.layers.1.mlp.down_proj"]["in_features"] = 500
    (dst / "lutra_report.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*6 words.*500"):
        measure_size(dst)


def test_size_of_a_dense_model(folder: Path, tmp_path: Path) -> None:
    size = measure_size(folder)
    assert (size.layers, size.bits_per_weight, size.bits_per_parameter) == ((), 16, 16)
    with pytest.raises(CheckpointError):
        measure_size(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_size_without_recorded_shapes(tiny_model: Callable[..., Path], family: str) -> None:
    """Inputs come from the model's skeleton: of GPT-2's transposed layers, of nested names."""
    from lutra.api import quantize

    src = tiny_model(family)
    dst = src.with_name("packed")
    quantize(src, dst, method="rtn", bits=3, group_size=32)
    recorded = measure_size(dst)
    (dst / "lutra_report.json").unlink()
    assert measure_size(dst) == recorded
    assert recorded.parameters == measure_size(src).parameters
    assert recorded.bits_per_weight == pytest.approx(3 + 2 * 16 / 32)


# ---- tasks


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tasks(root: Path) -> Path:
    write_rows(root / "lambada" / "lambada_test.jsonl", [
        {"text": "the otter swims in cold clear water"}, {"text": "it sleeps on its back"},
        {"text": "a stone a stone a stone"},
    ])  # fmt: skip
    write_rows(root / "tasks" / "quiz.jsonl", [
        {"query": "Question: where does it swim?", "choices": ["water", "a stone", "sand"],
         "gold": i % 3}
        for i in range(4)
    ])  # fmt: skip
    write_rows(root / "tasks" / "refer.jsonl", [
        {"context_options": ["the otter because the otter", "the otter because the stone"],
         "continuation": "was cold.", "gold": i % 2}
        for i in range(3)
    ])  # fmt: skip
    write_rows(root / "tasks" / "endings.jsonl", [
        {"ctx": "An otter [step] holds", "endings": ["a stone.", "an idea."], "label": "1",
         "activity_label": "Swimming"}
    ])  # fmt: skip
    return root


def test_reading_tasks(tmp_path: Path) -> None:
    root = make_tasks(tmp_path / "data")
    last_word, quiz, refer, endings = load_tasks(["lambada", "quiz", "refer", "endings"], root)
    assert last_word.rows[0] == {"context": "the otter swims in cold clear", "target": " water"}
    assert quiz.rows[1]["context"] == "Question: where does it swim?\nAnswer:"
    assert quiz.rows[1]["gold"] == 1
    assert refer.kind == "contexts" and refer.rows[0]["target"] == "was cold."
    assert endings.rows == [
        {"context": "Swimming: An otter holds", "choices": ["a stone.", "an idea."], "gold": 1}
    ]
    assert len(load_tasks(["quiz"], root, limit=2)[0].rows) == 2


def test_task_errors(tmp_path: Path, folder: Path) -> None:
    root = make_tasks(tmp_path / "data")
    with pytest.raises(CalibrationError, match=r"no arc_easy.jsonl .*there: .*quiz"):
        load_tasks(["arc_easy"], root)
    with pytest.raises(SchemeError, match="--tasks-dir"):
        evaluate(folder, tasks=["quiz"])
    with pytest.raises(SchemeError, match="no task name"):
        find_task("../quiz", root)
    write_rows(root / "other" / "quiz.jsonl", [{}])
    with pytest.raises(CalibrationError, match="could be any of"):
        find_task("quiz", root)
    good = {"query": "q", "choices": ["a", "b"], "gold": 0}
    for row, problem in (
        ("text", "not a JSON object"), ({"question": "q"}, "known are"),
        ({**good, "gold": 2}, "gold is 2"), ({**good, "choices": ["a"]}, "two options"),
        ({**good, "query": 3}, "should be a text"), ({"text": "word"}, "no last word"),
    ):  # fmt: skip
        path = write_rows(tmp_path / "bad.jsonl", [row])
        with pytest.raises(CalibrationError, match=f"bad.jsonl, line 1.*{problem}"):
            read_task("bad", path)
    path.write_text('{"text": "a b"}\n{"te\n')
    with pytest.raises(CalibrationError, match="line 2"):
        read_task("bad", path)
    path.write_text("\n")
    with pytest.raises(CalibrationError, match="no rows"):
        read_task("bad", path)


def test_without_the_harness(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ResourceError, match=r'pip install "lutra\[eval\]"'):
        evaluate(folder, tasks=["quiz"], tasks_dir=make_tasks(tmp_path / "data"))


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """The slow truth: sum of log p over the tokens of the continuation."""
    head = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(head), len(ids)))


def test_tasks_equal_a_loop_by_hand(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm-evaluation-harness needs it for torch models")
    from transformers import AutoTokenizer

    root = make_tasks(tmp_path / "data")
    names = ["lambada", "quiz", "refer", "endings"]
    scores = evaluate(folder, tasks=names, tasks_dir=root)["tasks"]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    last_word, quiz, refer, endings = load_tasks(names, root)

    def score(context: str, continuation: str) -> float:
        return log_likelihood(model, tokenizer, context, continuation)

    logs = [score(row["context"], row["target"]) for row in last_word.rows]
    expected = math.exp(-sum(logs) / len(logs))
    assert scores["lambada"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    for name, task in (("quiz", quiz), ("endings", endings)):
        right = right_norm = 0
        for row in task.rows:
            logs = [score(row["context"], " " + choice) for choice in row["choices"]]
            norm = [s / len(c) for s, c in zip(logs, row["choices"], strict=True)]
            right += logs.index(max(logs)) == row["gold"]
            right_norm += norm.index(max(norm)) == row["gold"]
        assert scores[name]["acc"] == right / len(task.rows)
        assert scores[name]["acc_norm"] == right_norm / len(task.rows)
    right = 0
    for row in refer.rows:
        logs = [score(context, " " + row["target"]) for context in row["choices"]]
        right += logs.index(max(logs)) == row["gold"]
    assert scores["refer"]["acc"] == right / len(refer.rows)
    assert scores["refer"]["items"] == 3


# ---- generate


def test_generate_equals_greedy_by_hand(folder: Path) -> None:
    from transformers import AutoTokenizer

    pieces: list[str] = []
    result = generate(folder, "the otter", 12, stream=pieces.append)
    assert "".join(pieces) == result["text"]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the otter", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(result["new_tokens"]):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert result["text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert result["prompt_tokens"] == start
    assert result["stopped"] == ("length" if result["new_tokens"] == 12 else "end")
    drawn = [generate(folder, "the otter", 12, temperature=1.0, seed=s)["text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_errors(folder: Path) -> None:
    with pytest.raises(LutraError, match="prompt is empty"):
        generate(folder, "  ")
    with pytest.raises(LutraError, match="80 tokens, and the model has 64 positions"):
        generate(folder, "x" * 80)
    with pytest.raises(SchemeError, match="max-new-tokens"):
        generate(folder, "x", 0)
    with pytest.raises(SchemeError, match="temperature"):
        generate(folder, "x", temperature=-1)
    result = generate(folder, "x" * 60, 50)
    assert result["new_tokens"] <= 4
    assert result["stopped"] in ("positions", "end")


# ---- bench


def test_bench_model(folder: Path) -> None:
    from lutra.bench.model import bench_model

    result = bench_model(folder, prompt_len=8, new_tokens=4, repeats=1, layers=1)
    weights = load_file(folder / "model.safetensors")
    whole = sum(
        t.numel() for n, t in weights.items() if "layers.1" not in n and "embed_tokens" not in n
    )
    assert result["weight_bytes_per_token"] == 4 * whole  # float32 on the CPU
    assert result["tokens_per_second"] == pytest.approx(1000 / result["ms_per_token"])
    assert result["layers"] == [1, 2] and result["format"] == "dense"
    for key in ("ttft_ms", "memory_gb", "gbps", "read_limit_gbps"):
        assert result[key] > 0
    with pytest.raises(SchemeError, match="llama-3-8b"):
        bench_model("llama-99")
    with pytest.raises(SchemeError, match="only 2 blocks"):
        bench_model(folder, layers=3)
    with pytest.raises(SchemeError, match="64 positions"):
        bench_model(folder, prompt_len=64)


def test_bench_of_a_shape_builds_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from lutra.bench import model as bench

    tiny = dict(bench.SHAPES["llama-3-8b"])
    tiny |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 50, "num_hidden_layers": 3}
    monkeypatch.setitem(bench.SHAPES, "tiny", tiny)
    result = bench.bench_model("tiny", bits=3, group_size=32, layers=2, prompt_len=4, new_tokens=2)
    assert sum(result["kernels"].values()) == 2 * 7
    assert result["format"] == "bcq3g32"
    per_block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96
    packed = per_block * (3 + (3 + 1) * 16 / 32) / 8
    rest = 4 * (50 * 64 + 5 * 64)  # the head and five norms, float32
    assert result["weight_bytes_per_token"] == 2 * packed + rest
    dense = bench.bench_model("tiny", bits=16, prompt_len=4, new_tokens=1, repeats=1)
    assert dense["format"] == "dense" and dense["kernels"] == {}


# ---- real models


def test_a_trained_model(shared: Path) -> None:
    """The figure that the models' README gives for this model, within what a short text allows."""
    model = shared / "models" / "stories260k"
    text = shared / "data" / "tinystories-excerpt" / "tinystories_train_first_2MiB.txt"
    result = evaluate(model, text=text, against=model, seq_len=128, max_windows=4)
    assert 4 < result["perplexity"] < 12
    assert result["kl_mean"] == 0 and result["top1_agreement"] == 1
    assert result["bits_per_weight"] == 32


def test_uniform_predictions_have_the_entropy_of_the_vocabulary() -> None:
    nll = token_nll(torch.zeros(1, 3, 512), torch.zeros(1, 3, dtype=torch.int64))
    assert nll.mean().item() == pytest.approx(math.log(512))
