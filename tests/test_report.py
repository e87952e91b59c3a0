"""The report page, the report's JSON and the model card."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from packed_models import make_model, pack_layers

from lutra.errors import CheckpointError, ResourceError
from lutra.evaluate import report, write_report
from lutra.evaluate.card import licence_of, source_facts
from lutra.evaluate.plots import block_of, layer_errors, plain, size_in_words

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib")


def make_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"name": "original", "reference": True, "perplexity": 20.0, "bits_per_weight": 16.0,
         "size_bytes": 9_000_000}
    ]  # fmt: skip
    for method, factor in (("rtn", 2.0), ("lut-gemm", 1.0)):
        for bits in (4, 3, 2):
            cost = factor * 2.0 ** (4 - bits)
            rows.append({
                "name": f"{method} {bits}", "method": method, "bits_per_weight": bits + 0.25,
                "perplexity": 20 + cost, "kl_mean": cost / 50, "top1_agreement": 1 - cost / 40,
                "size_bytes": 500_000 * bits, "tokens_per_second": 100.0 / bits,
                "layers": {f"model.layers.{i}.mlp.{k}_proj": {"error": 0.01 * cost * (1 + i)}
                           for i in range(3) for k in ("up", "down")},
            })  # fmt: skip
    return rows


class Page(HTMLParser):
    """Collects tags and everything that a page could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and value and not value.startswith("#"):
                self.loads.append(value)
            if key == "id" and value:
                self.ids.append(value)


def test_page_stands_alone(tmp_path: Path) -> None:
    path = write_report(make_rows(), tmp_path / "page.html", title="Otters", facts={"seed": 0})
    text = path.read_text()
    page = Page(text)
    assert page.loads == [] and "script" not in page.tags and "link" not in page.tags
    assert "url(http" not in text and "@import" not in text
    assert page.tags.count("svg") == 4  # perplexity, divergence, size, error by block
    assert len(page.ids) == len(set(page.ids)), "plots must not share ids"
    assert "currentColor" in text and "#010203" not in text
    for shown in ("original 20.00", "97.5 %", "9.00 MB", "4.250", "33.3", "lut-gemm 2"):
        assert shown in text
    again = write_report(make_rows(), tmp_path / "again.html", title="Otters", facts={"seed": 0})
    assert again.read_bytes() == path.read_bytes()


def test_page_escapes_and_survives_what_is_missing(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [{"name": evil, "method": evil, "perplexity": math.inf, "bits_per_weight": 2.0},
            {"name": "a", "bits_per_weight": 3.0, "perplexity": 8.0, "kl_mean": None},
            {"name": "b", "bits_per_weight": 4.0, "perplexity": 9e6}]  # fmt: skip
    text = write_report(rows, tmp_path / "page.html", title=evil, facts={evil: evil}).read_text()
    assert "<script" not in text and "∞" in text and "9,000,000" in text
    assert write_report([{"name": "alone"}], tmp_path / "one.html").exists()
    with pytest.raises(ResourceError, match=r"page\.html can not be written"):
        write_report(rows, tmp_path / "no" / "page.html")


def test_report_of_a_folder(tmp_path: Path) -> None:
    src = make_model(tmp_path / "otter")
    (src / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Otter\n")
    dst = tmp_path / "otter-3bit"
    packed = pack_layers(src, dst)
    errors = {
        "layers": {
            n: {"in_features": w.in_features, "error": 0.1, "error_of": "output"}
            for n, w in packed.items()
        }
    }
    (dst / "lutra_report.json").write_text(json.dumps(errors))
    evaluation = {
        "perplexity": 21.5, "perplexity_reference": 20.0, "kl_mean": 0.05, "kl_p99": math.inf,
        "top1_agreement": 0.9, "tokens": 1000, "windows": 4, "seq_len": 64,
        "text_sha256": "ab" * 32,
        "joined": "the file as it stands",
        "tasks": {"quiz": {"items": 40, "acc": 0.5, "acc_stderr": 0.08}},
    }  # fmt: skip
    content = report(dst, evaluation=evaluation, source=src, bench={"tokens_per_second": 12.0})
    text = (dst / "report.json").read_text()
    assert json.loads(text)["evaluation"]["kl_p99"] is None and "Infinity" not in text
    assert content["source"]["licence"] == "apache-2.0"
    assert content["size"]["bits_per_weight"] < 4
    card = (dst / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for shown in ("AutoModelForCausalLM.from_pretrained", "21.50", "20.00", "90.0 %", "rtn",
                  "50.0 ± 8.0", "ab" * 32, "otter", "ubcq3g64"):  # fmt: skip
        assert shown in card, shown
    assert str(tmp_path) not in card + text + (dst / "report.html").read_text()
    page = Page((dst / "report.html").read_text())
    assert page.loads == [] and page.tags.count("svg") == 2  # size, error of each layer
    assert "relative output error" in (dst / "report.html").read_text()
    # Once more with nothing new: what was known stays, and no byte changes.
    before = {p.name: p.read_bytes() for p in dst.iterdir()}
    report(dst)
    assert {p.name: p.read_bytes() for p in dst.iterdir()} == before


def test_report_errors(tmp_path: Path) -> None:
    src = make_model(tmp_path / "otter")
    with pytest.raises(CheckpointError, match="not quantized by lutra"):
        report(src)
    dst = tmp_path / "packed"
    pack_layers(src, dst)
    (dst / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report\.json can not be read"):
        report(dst)


def test_card_without_evaluation_or_source(tmp_path: Path) -> None:
    src = make_model(tmp_path / "otter")
    pack_layers(src, tmp_path / "packed")
    report(tmp_path / "packed", page=False)
    assert not (tmp_path / "packed" / "report.html").exists()
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "license:" not in card and "look them up" in card and "What it costs" not in card


def test_source_facts(tmp_path: Path) -> None:
    src = make_model(tmp_path / "otter")
    facts = source_facts(src)
    assert (facts["name"], facts["hub_id"], facts["licence"]) == ("otter", None, None)
    (src / "README.md").write_text("# No header\nlicense: mit\n")
    assert licence_of(src) is None
    (src / "README.md").write_text("---\ntags:\n- x\nlicense: 'cc-by-sa-4.0'\n---\n")
    assert licence_of(src) == "cc-by-sa-4.0"
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"_name_or_path": "pond/otter-7b"}))
    assert source_facts(src)["hub_id"] == "pond/otter-7b"


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ResourceError, match=r'pip install "lutra\[report\]"'):
        write_report(make_rows(), tmp_path / "page.html")


def test_numbers() -> None:
    cases = {0: "0", 63.4392: "63.44", 117.4: "117.4", 12345.6: "12,346", 0.01234: "0.0123",
             0.5: "0.500", 0.00002: "2.0e-05", math.inf: "∞"}  # fmt: skip
    assert {value: plain(value) for value in cases} == cases
    assert [size_in_words(n) for n in (12, 4_200, 34_600_000, 8_030_000_000)] == [
        "12 B", "4.20 kB", "34.6 MB", "8.03 GB"
    ]  # fmt: skip
    assert block_of("model.layers.12.mlp.up_proj") == 12 and block_of("lm_head") is None
    found = layer_errors({"layers": {"a": 0.5, "b": {"error": None}, "c": {"error": 1}}})
    assert found == {"a": 0.5, "c": 1.0}
    assert re.fullmatch(r"[\d.]+", plain(1.5))
