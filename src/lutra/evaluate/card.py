"""The model card: ``README.md`` of a quantized folder, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lutra.evaluate.plots import size_in_words
from lutra.evaluate.report import cell, fact_in_words, report_rows, task_score
from lutra.evaluate.size import measure_size
from lutra.formats.checkpoint import SourceCheckpoint

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def source_facts(source: str | Path) -> dict[str, Any]:
    """What the card and the report say of the original model.

    Args:
        source: its folder or hub id.

    Returns:
        ``name`` (the hub id where one is known, else the folder's name), ``hub_id`` or None,
        ``licence`` as its own model card states it or None, ``size_bytes``, ``bits_per_weight``.

    Raises:
        CheckpointError: the folder is no sound checkpoint.
    """
    checkpoint = SourceCheckpoint.open(source, quantized=True)
    size = measure_size(checkpoint.path)
    named = [str(source), str(checkpoint.config.get("_name_or_path") or "")]
    # A folder's path looks like a hub id too ("models/llama"), hence the second look.
    ids = [n for n in named if _HUB_ID.fullmatch(n) and not Path(n).exists()]
    return {
        "name": ids[0] if ids else checkpoint.path.resolve().name,
        "hub_id": ids[0] if ids else None,
        "licence": licence_of(checkpoint.path),
        "size_bytes": size.size_bytes,
        "bits_per_weight": size.bits_per_weight,
    }


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's model card names in its header, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*\n", text, flags=re.DOTALL)
    if header is None:
        return None
    line = r"^license:[ \t]*['\"]?([\w.+-]+)['\"]?[ \t]*$"
    licence = re.search(line, header[1], flags=re.MULTILINE)
    return licence[1] if licence else None


def model_card(content: Mapping[str, Any]) -> str:
    """The card's text, from the content of ``report.json``.

    Args:
        content: what :func:`lutra.evaluate.report.report` returns.
    """
    quantization = content["quantization"]
    source = content.get("source") or {}
    name = content["model"]
    method = quantization.get("method")
    base = source.get("name") or (content.get("evaluation") or {}).get("against")
    size = content["size"]

    header = ["---"]
    if source.get("hub_id"):
        header.append(f"base_model: {source['hub_id']}")
        header.append("base_model_relation: quantized")
    if source.get("licence"):
        header.append(f"license: {source['licence']}")
    header += ["library_name: transformers", "pipeline_tag: text-generation"]
    header += ["tags:", "- lutra", "- quantized"]
    if method:
        header.append(f"- {method}")
    header += ["---", ""]

    made_from = f" of `{_code(base)}`" if base else ""
    by = f" by the method `{_code(method)}`" if method else ""
    lines = [
        f"# {_escape(name)}",
        "",
        (
            f"A low-bit version{made_from}, made by lutra{by}: "
            f"{size['bits_per_weight']:.3f} bits per weight in the quantized layers, "
            f"{size_in_words(size['size_bytes'])} in all."
        ),
        "",
        "## Load it",
        "",
        "```python",
        "import lutra, transformers",
        f"model = transformers.AutoModelForCausalLM.from_pretrained({json.dumps(name)})",
        "```",
        "",
        (
            "The name is this folder's. `import lutra` teaches transformers the format; without "
            "it, loading stops with an error."
        ),
        "",
        *_evaluation_section(content),
        "## How it was made",
        "",
        *_table(["", ""], [[k, v] for k, v in recipe(quantization)]),
        "",
        "## Licence",
        "",
    ]
    if source.get("licence"):
        lines.append(
            f"The original's model card says `{_code(source['licence'])}`; a quantized copy is "
            "under the same terms."
        )
    else:
        lines.append(
            "The original's model card was not there or names no licence. A quantized copy is "
            "under the terms of the original: look them up before passing it on."
        )
    return "\n".join([*header, *lines]) + "\n"


def _evaluation_section(content: Mapping[str, Any]) -> list[str]:
    evaluation = content.get("evaluation")
    if not evaluation:
        return []
    columns = {
        "name": "model", "bits_per_weight": "bits per weight", "perplexity": "perplexity",
        "kl_mean": "KL, mean", "kl_p99": "KL, 99\u00a0%", "top1_agreement": "same top token",
        "size_bytes": "size",
    }  # fmt: skip
    rows = report_rows(content)
    used = [key for key in columns if any(row.get(key) is not None for row in rows)]
    table = [[cell(key, row.get(key)) for key in used] for row in rows]
    lines = ["## What it costs", "", *_table([columns[k] for k in used], table), ""]
    if evaluation.get("seq_len"):
        lines += [
            (
                f"Measured over {evaluation['tokens']:,} predicted tokens in "
                f"{evaluation['windows']:,} non-overlapping windows of {evaluation['seq_len']:,}; "
                f"{evaluation['joined']}; SHA-256 of the text `{evaluation['text_sha256']}`. KL is "
                "KL(original || this model) per token in nats, over the whole vocabulary."
            ),
            "",
        ]
    if evaluation.get("tasks"):
        scores = [[t, f"{s['items']:,}", task_score(s)] for t, s in evaluation["tasks"].items()]
        lines += [*_table(["task", "items", "accuracy, %"], scores), ""]
        lines += ["Tasks by lm-evaluation-harness, no examples in the prompt.", ""]
    return lines


def recipe(quantization: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ``quantization_config`` says, in words and in the order of interest."""
    order = ["method", "scheme", "options", "seed", "calibration", "versions"]
    keys = [k for k in order if k in quantization]
    keys += [k for k in quantization if k not in order and k != "quant_method"]
    return [
        (key.replace("_", " "), fact_in_words(quantization[key]))
        for key in keys
        if quantization[key] not in (None, {}, [], "")
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(_escape(c) for c in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)]


def _escape(text: Any) -> str:
    """Text from files as plain Markdown: no markup, no end of a table's cell."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _code(text: Any) -> str:
    """Text for a code span."""
    return " ".join(str(text).split()).replace("`", "'")
