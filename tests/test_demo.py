"""The demo: its text, its model, and a short run of the whole job."""

from __future__ import annotations

import json

import pytest

from lutra.demo import run, text
from lutra.demo.walkthrough import MODEL, VARIANTS
from lutra.errors import CalibrationError, ResourceError


@pytest.fixture(scope="module")
def documents():
    return text.training_documents()


def test_training_text_shares_no_run_with_the_held_out_topics(documents):
    held_out = set(text._runs(text.held_out_text()))
    paragraphs = [p for document in documents for p in document.split("\n\n")]
    assert len(held_out) > 5_000 and len(paragraphs) > 5_000
    assert all(held_out.isdisjoint(text._runs(p)) for p in paragraphs)


def test_no_paragraph_comes_twice(documents):
    paragraphs = [" ".join(p.split()) for d in documents for p in d.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_calibration_text_is_training_text(documents):
    calibration = text.calibration_text()
    assert calibration == text.calibration_text()
    assert 100_000 < len(calibration) and "\n".join(documents).startswith(calibration)


def test_a_python_without_the_topics_is_refused(monkeypatch):
    monkeypatch.delitem(text.topics, "raise")
    with pytest.raises(CalibrationError, match="raise"):
        text.held_out_text()


def test_the_model_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) <= 6_000_000


def test_a_short_run(tmp_path, capsys):
    output = tmp_path / "out"
    result = run(output, bits=(3, 2), variants=VARIANTS[:1], max_windows=4)
    original, *quantized = result["rows"]
    assert original["reference"] and original["kl_mean"] is None
    assert 10 < original["perplexity"] < 40  # trained: a unigram model has 568
    assert [round(row["bits_per_weight"], 2) for row in quantized] == [3.25, 2.25]
    assert original["perplexity"] < quantized[0]["perplexity"] < quantized[1]["perplexity"]
    assert original["size_bytes"] > quantized[0]["size_bytes"] > quantized[1]["size_bytes"]
    assert json.loads((output / "results.json").read_text())["rows"] == result["rows"]
    page = (output / "report.html").read_text()
    assert "<svg" in page and all(row["name"] in page for row in quantized)
    assert "rtn 3 bit" in capsys.readouterr().out

    run(output, bits=(4,), variants=VARIANTS[:1], max_windows=2)  # an earlier demo is replaced
    assert [p.name for p in (output / "models").iterdir()] == ["rtn-4-bit"]


def test_a_folder_of_someone_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResourceError, match="not made by the demo"):
        run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
