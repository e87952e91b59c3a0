"""The report: one HTML file that needs nothing beside it, a JSON file, and the model card.

:func:`write_report` compares any number of models; :func:`report` writes ``report.json``,
``report.html`` and ``README.md`` (:mod:`lutra.evaluate.card`) into a quantized folder. The page has
no script and loads nothing; its plots are SVG within it (:mod:`lutra.evaluate.plots`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lutra.errors import CheckpointError, ResourceError
from lutra.evaluate.plots import (
    error_of,
    layer_errors,
    plain,
    plot_against_bits,
    plot_block_errors,
    plot_layer_errors,
    plot_sizes,
    size_in_words,
)
from lutra.evaluate.size import ModelSize, is_quantized, measure_size, read_facts
from lutra.formats.checkpoint import SourceCheckpoint
from lutra.formats.shard import write_file

REPORT_JSON, REPORT_HTML, CARD = "report.json", "report.html", "README.md"

# One page for light and dark: colours are variables, plots take the text colour.
_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #1c2126; --soft: #5d6670; --line: #d9dee3; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e4e8ec; --soft: #9aa4ae; --line: #333b43; --band: #1c2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p, li { max-width: 46rem; }
.soft, figcaption, caption { color: var(--soft); }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
table.full { width: 100%; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child { text-align: left; }
tr.reference td { background: var(--band); }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 1.6rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; margin-top: .3rem; }
summary { cursor: pointer; }
details { margin-top: .6rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if intro %}<p class="soft">{{ intro }}</p>{% endif %}
<div class="table"><table class="full">
<thead><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table %}<tr{% if row.reference %} class="reference"{% endif %}>\
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% if notes %}<p class="soft">{{ notes }}</p>{% endif %}
{% if plots %}<h2>Plots</h2>
<div class="plots">
{% for caption, svg in plots %}<figure>{{ svg | safe }}
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}</div>{% endif %}
{% if task_table %}<h2>Tasks</h2>
<div class="table"><table>
<thead><tr>{% for column in task_columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in task_table %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>{% endif %}
{% if layers %}<h2>Layers</h2>
<details><summary>{{ layers | length }} quantized layers</summary>
<div class="table"><table>
<thead><tr><th>layer</th><th>format</th><th>out × in</th><th>bits per weight</th>\
<th>relative error</th></tr></thead>
<tbody>
{% for cells in layers %}<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div></details>{% endif %}
{% if facts %}<h2>How this was made</h2>
<div class="table"><table>
<tbody>
{% for key, value in facts %}<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% endfor %}</tbody>
</table></div>{% endif %}
</body>
</html>
"""

_COLUMNS = (
    ("name", "model"),
    ("bits_per_weight", "bits per weight"),
    ("perplexity", "perplexity"),
    ("kl_mean", "KL, mean"),
    ("kl_p99", "KL, 99\u00a0%"),
    ("top1_agreement", "same top token"),
    ("size_bytes", "size"),
    ("tokens_per_second", "tokens/s"),
)


def write_report(
    rows: Sequence[Mapping[str, Any]],
    out_html: str | Path,
    *,
    title: str = "Quantized models",
    intro: str | None = None,
    facts: Mapping[str, Any] | None = None,
    layers: Sequence[Sequence[str]] = (),
) -> Path:
    """Write the page that compares models.

    Args:
        rows: one dict a model: ``name``, and as far as known ``method`` (models of one method make
            a line in the plots), ``bits_per_weight``, ``perplexity``, ``kl_mean``, ``kl_p99``,
            ``top1_agreement``, ``size_bytes``, ``tokens_per_second``, ``tasks`` (of
            :func:`lutra.evaluate.evaluate`), ``layers`` (``{name: {"error": ...}}``). A row with
            ``reference=True`` is the original model.
        out_html: the file to write.
        title, intro: heading, and a sentence below it.
        facts: key and value of the table "How this was made".
        layers: cells of the table of layers: name, format, shape, bits per weight, error.

    Returns:
        The path of the page.

    Raises:
        ResourceError: matplotlib or jinja2 is missing, or the file can not be written.
    """  # fmt: skip
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ResourceError(
            f'the report needs jinja2 ({error}). Install it: pip install "lutra[report]"'
        ) from error
    references = [row for row in rows if row.get("reference")]
    known = [row.get("perplexity") for row in references]
    known += [row.get("perplexity_reference") for row in rows]
    reference = next((value for value in known if value is not None), None)
    used = [(k, t) for k, t in _COLUMNS if any(row.get(k) is not None for row in rows)]
    table = [
        {"reference": bool(row.get("reference")), "cells": [cell(k, row.get(k)) for k, _ in used]}
        for row in rows
    ]
    compared = [row for row in rows if not row.get("reference")]
    plots = []
    if len(compared) > 1:  # a single point is no plot; the table says it
        plots += [
            (
                "Perplexity against bits per weight. Lower is better; left is smaller.",
                plot_against_bits(rows, "perplexity", "perplexity", reference),
            ),
            (
                "Mean KL divergence of the predictions from the original model's, in nats.",
                plot_against_bits(rows, "kl_mean", "KL divergence"),
            ),
        ]
    if len(rows) > 1:
        plots.append(("Size of all tensors of each model.", plot_sizes(rows)))
    if len(compared) == 1:
        plots.append(
            (
                "Error of each quantized layer, by block of the model.",
                plot_layer_errors(layer_errors(compared[0]), error_of(compared)),
            )
        )
    else:
        plots.append(
            (
                "Error of the quantized layers, mean of each block.",
                plot_block_errors(compared),
            )
        )
    task_columns, task_table = _task_table(rows)
    # The template is ours and its values are not: everything but our own SVG is escaped.
    page = Environment(autoescape=True).from_string(_PAGE).render(
        title=title, intro=intro, columns=[t for _, t in used], table=table,
        notes=_notes(rows), plots=[(c, svg) for c, svg in plots if svg],
        task_columns=task_columns, task_table=task_table, layers=layers,
        facts=[(key, fact_in_words(value)) for key, value in (facts or {}).items()],
    )  # fmt: skip
    out = Path(out_html)
    _write(out, page)
    return out


def report(
    dst: str | Path,
    *,
    evaluation: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    page: bool = True,
) -> dict[str, Any]:
    """Write ``report.json``, ``report.html`` and the model card into a checkpoint's folder.

    Called again, it keeps what an earlier ``report.json`` says and is not given anew.

    Args:
        dst: a folder that lutra quantized.
        evaluation: what :func:`lutra.evaluate.evaluate` returned for it.
        bench: what ``bench_model`` returned for it.
        source: the original's folder; its size is compared, and its model card says the licence.
        page: whether to write ``report.html``, which needs matplotlib; the other two do not.

    Returns:
        The content of ``report.json``: ``model``, ``quantization``, ``size``, ``evaluation``,
        ``bench``, ``layers``, ``source``.

    Raises:
        CheckpointError: the folder holds no checkpoint of ours, or an older report is damaged.
        ResourceError: a package is missing, or a file can not be written.
    """  # fmt: skip
    from lutra.evaluate.card import model_card, recipe, source_facts

    folder = Path(dst)
    checkpoint = SourceCheckpoint.open(folder, quantized=True)
    if not is_quantized(checkpoint.config):
        raise CheckpointError(f"{folder} was not quantized by lutra; there is nothing to report")
    earlier = _earlier(folder)
    size = measure_size(folder)
    facts = read_facts(folder)
    layers = _layers(size, facts)
    content: dict[str, Any] = {
        "model": folder.resolve().name,
        "quantization": checkpoint.config["quantization_config"],
        "size": {
            "bits_per_weight": size.bits_per_weight,
            "bits_per_parameter": size.bits_per_parameter,
            "size_bytes": size.size_bytes,
            "parameters": size.parameters,
        },
        "evaluation": dict(evaluation) if evaluation is not None else earlier.get("evaluation"),
        "bench": dict(bench) if bench is not None else earlier.get("bench"),
        "source": source_facts(source) if source is not None else earlier.get("source"),
        "layers": layers,
    }
    content = _finite(content)
    _write(folder / REPORT_JSON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _write(folder / CARD, model_card(content))
    if page:
        write_report(
            report_rows(content), folder / REPORT_HTML, title=content["model"],
            facts=dict(recipe(content["quantization"])),
            layers=[_layer_cells(name, layer) for name, layer in layers.items()],
        )  # fmt: skip
    return content


def report_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparison rows of one ``report.json``: the original, as far as known, and the model."""
    evaluation = content.get("evaluation") or {}
    bench = content.get("bench") or {}
    source = content.get("source") or {}
    rows: list[dict[str, Any]] = []
    if source or evaluation.get("perplexity_reference") is not None:
        rows.append(
            {
                "name": source.get("name") or evaluation.get("against") or "original",
                "reference": True,
                "perplexity": evaluation.get("perplexity_reference"),
                "bits_per_weight": source.get("bits_per_weight"),
                "size_bytes": source.get("size_bytes"),
            }
        )
    row = {key: evaluation.get(key) for key, _ in _COLUMNS if key != "tokens_per_second"}
    rows.append(
        row
        | {k: content["size"][k] for k in ("bits_per_weight", "size_bytes")}
        | {
            "name": content["model"],
            "method": content["quantization"].get("method"),
            "tokens_per_second": bench.get("tokens_per_second"),
            "tasks": evaluation.get("tasks"),
            "layers": content["layers"],
            **{k: evaluation.get(k) for k in ("seq_len", "tokens", "joined", "text_sha256")},
        }
    )
    return rows


def cell(key: str, value: Any) -> str:
    """One figure as the tables show it; a dash where it is not known."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if key == "top1_agreement":
        return f"{100 * value:.1f} %"
    if key == "bits_per_weight":
        return f"{value:.3f}"
    if key == "size_bytes":
        return size_in_words(value)
    if key == "tokens_per_second" and 1 <= value < 1000:
        return f"{value:.1f}"
    if key == "perplexity" and 1 <= value < 1000:
        return f"{value:.2f}"
    return plain(value)


def task_score(row: Mapping[str, Any]) -> str:
    """Accuracy in percent with its standard error."""
    error = row.get("acc_stderr")
    spread = "" if error is None else f" ± {100 * error:.1f}"
    return f"{100 * row['acc']:.1f}{spread}"


def _task_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    with_tasks = [row for row in rows if row.get("tasks")]
    names = list(dict.fromkeys(name for row in with_tasks for name in row["tasks"]))
    table = []
    for name in names:
        scores = [row["tasks"].get(name) for row in with_tasks]
        items = next(score["items"] for score in scores if score)
        cells = [task_score(score) if score else "–" for score in scores]
        table.append([name, f"{items:,}", *cells])
    return ["task", "items", *(f"{row.get('name', '')}, accuracy %" for row in with_tasks)], table


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How perplexity was measured, where all rows that say so agree."""
    said = {
        (row["tokens"], row["seq_len"], row.get("joined")) for row in rows if row.get("seq_len")
    }
    notes = []
    if len(said) == 1:
        tokens, seq_len, joined = said.pop()
        text = f", {joined}" if joined else ""
        notes.append(
            f"Perplexity and KL over {tokens:,} predicted tokens in windows of {seq_len:,}{text}."
        )
    if any(row.get("kl_mean") is not None for row in rows):
        notes.append(
            "KL is the divergence of the predictions from the original model's, in nats, over the "
            "whole vocabulary."
        )
    if any(row.get("bits_per_weight") is not None for row in rows):
        notes.append(
            "Bits per weight count everything stored for the quantized layers, scales included."
        )
    return " ".join(notes)


def _layers(size: ModelSize, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is known of each quantized layer: from the files, and its error where it was noted."""
    recorded = facts.get("layers")
    recorded = recorded if isinstance(recorded, Mapping) else {}
    layers = {}
    for layer in size.layers:
        fact = recorded.get(layer.name)
        fact = fact if isinstance(fact, Mapping) else {}
        layers[layer.name] = {
            "format": layer.format,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bits_per_weight": layer.bits_per_weight,
            "error": fact.get("error"),
            "error_of": fact.get("error_of"),
        }
    return layers


def _layer_cells(name: str, layer: Mapping[str, Any]) -> tuple[str, ...]:
    shape = f"{layer['out_features']} × {layer['in_features']}"
    bits, error = cell("bits_per_weight", layer["bits_per_weight"]), cell("error", layer["error"])
    return name, layer["format"] or "–", shape, bits, error


def _earlier(folder: Path) -> dict[str, Any]:
    path = folder / REPORT_JSON
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can not be read as JSON: {error}. Delete it.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object. Delete it.")
    return content


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a figure that overflowed becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def fact_in_words(value: Any) -> str:
    """A value of ``quantization_config`` as tables show it."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')} {fact_in_words(item)}" for key, item in value.items()
        )
    if isinstance(value, list | tuple) and all(
        isinstance(item, list | tuple) and len(item) == 2 for item in value
    ):  # scheme rules
        return "; ".join(f"{a} → {'as it is' if b is None else b}" for a, b in value)
    if isinstance(value, list | tuple):
        return ", ".join(map(fact_in_words, value))
    if isinstance(value, float):
        return plain(value)
    return str(value)


def _write(path: Path, text: str) -> None:
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise ResourceError(f"{path} can not be written: {error.strerror or error}") from error
