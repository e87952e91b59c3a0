"""LAMBADA and multiple-choice tasks from local files, scored by lm-evaluation-harness.

A task is a file ``NAME.jsonl`` (``NAME_test.jsonl`` for LAMBADA), one JSON object a line, of one of
these forms:

- ``text``: LAMBADA. The last word, after the last space, is predicted from the rest.
- ``query``, ``choices``, ``gold``: each choice is scored as the continuation of the query, after a
  space. A query that begins with ``Question:`` or ``Passage:`` gets the usual ``\\nAnswer:``.
- ``context_options``, ``continuation``, ``gold``: the one continuation after each context
  (WinoGrande, Winograd).
- ``ctx``, ``endings``, ``label``: HellaSwag, cleaned as the harness cleans it.

No network is used, and nothing is written to the caches of the Hugging Face libraries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutra.errors import CalibrationError, SchemeError

#: Forms of a row: the keys that tell which one a file has.
_FORMS = {
    "lambada": ("text",),
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "hellaswag": ("ctx", "endings", "label"),
}


@dataclass(frozen=True)
class Task:
    """A task read from a file.

    Attributes:
        name: the name that was asked for.
        path: its file.
        kind: ``lambada`` (last word), ``choices`` (one context) or ``contexts`` (one continuation).
        rows: dicts with ``context`` and ``target`` (lambada); ``context``, ``choices``, ``gold``;
            or ``choices`` (the contexts), ``target``, ``gold``.
    """

    name: str
    path: Path
    kind: str
    rows: list[dict[str, Any]]


def load_tasks(names: Sequence[str], folder: Path | None, limit: int | None = None) -> list[Task]:
    """Find and read task files.

    Args:
        names: such as ``lambada`` and ``arc_easy``.
        folder: where the files lie, or their subfolders.
        limit: read only the first so many rows.

    Raises:
        SchemeError: no folder was given, or the limit is not positive.
        CalibrationError: a file is missing, ambiguous, empty or not of a known form.
    """
    if folder is None:
        raise SchemeError("tasks are read from local files: say where they lie with --tasks-dir")
    if not folder.is_dir():
        raise CalibrationError(f"the folder of the tasks, {folder}, does not exist")
    if limit is not None and limit < 1:
        raise SchemeError(f"--limit must be at least 1, not {limit}")
    return [read_task(name, find_task(name, folder), limit) for name in names]


def find_task(name: str, folder: Path) -> Path:
    """``NAME.jsonl`` in a folder or one level below, else the only ``NAME_*.jsonl``.

    Raises:
        CalibrationError: none, or several.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise SchemeError(f"{name!r} is no task name; it should be like arc_easy")
    for pattern in (f"{name}.jsonl", f"*/{name}.jsonl", f"{name}_*.jsonl", f"*/{name}_*.jsonl"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            listed = ", ".join(str(p.relative_to(folder)) for p in found)
            raise CalibrationError(f"task {name!r} could be any of {listed} in {folder}")
        if found:
            return found[0]
    there = sorted({p.stem for p in (*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl"))})
    raise CalibrationError(
        f"there is no {name}.jsonl in {folder}; tasks there: {', '.join(there) or 'none'}"
    )


def read_task(name: str, path: Path, limit: int | None = None) -> Task:
    """Read and check one task file.

    Raises:
        CalibrationError: naming the file and the line that can not be used.
    """
    rows: list[dict[str, Any]] = []
    form = ""
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                if not line.strip():
                    continue
                if limit is not None and len(rows) == limit:
                    break
                row = json.loads(line)
                form = form or _form_of(row)
                rows.append(_read_row(row, form))
    except OSError as error:
        raise CalibrationError(f"{path} can not be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise CalibrationError(f"{path}, line {number}, is no row of a task: {problem}") from error
    if not rows:
        raise CalibrationError(f"{path} has no rows")
    kind = "choices" if form == "hellaswag" else form
    return Task(name, path, kind, rows)


def run_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[Task], batch_size: int = 1
) -> dict[str, dict[str, Any]]:
    """Score tasks with a loaded model through lm-evaluation-harness.

    Returns:
        By task: ``items``, and ``acc`` with ``acc_stderr``; multiple choice also ``acc_norm``
        (log-likelihood per character), LAMBADA also ``perplexity`` (of the last word).

    Raises:
        ResourceError: lm-evaluation-harness is not installed.
    """
    from lutra.integrations.lm_eval import score

    return score(model, tokenizer, tasks, batch_size)


def _form_of(row: Any) -> str:
    if not isinstance(row, dict):
        raise TypeError("it is not a JSON object")
    for form, keys in _FORMS.items():
        if all(key in row for key in keys):
            return form
    known = "; ".join(", ".join(keys) for keys in _FORMS.values())
    raise ValueError(f"its keys are {', '.join(row)}; known are: {known}")


def _read_row(row: dict[str, Any], form: str) -> dict[str, Any]:
    if form == "lambada":
        context, space, target = _text(row["text"]).rpartition(" ")
        if not space or not target:
            raise ValueError("the text has no last word after a space")
        return {"context": context, "target": " " + target}
    if form == "hellaswag":
        return _hellaswag(row)
    options = row["choices" if form == "choices" else "context_options"]
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError("it needs at least two options")
    options = [_text(option) for option in options]
    gold = _gold(row["gold"], len(options))
    if form == "contexts":
        return {"choices": options, "target": _text(row["continuation"]), "gold": gold}
    return {"context": _prompt(_text(row["query"])), "choices": options, "gold": gold}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} should be a text")
    return value


def _gold(value: Any, options: int) -> int:
    gold = int(value)
    if not 0 <= gold < options:
        raise ValueError(f"gold is {gold}, and there are {options} options, counted from 0")
    return gold


def _prompt(query: str) -> str:
    query = query.strip()
    if query.startswith(("Question:", "Passage:")) and not query.endswith("Answer:"):
        query += "\nAnswer:"
    return query


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    context = _text(row["ctx"])
    if "ctx_a" in row and "ctx_b" in row:
        context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    if row.get("activity_label"):
        context = f"{row['activity_label']}: {context}"
    endings = [_clean_hellaswag(_text(ending)) for ending in row["endings"]]
    gold = _gold(row["label"], len(endings))
    return {"context": _clean_hellaswag(context), "choices": endings, "gold": gold}


def _clean_hellaswag(text: str) -> str:
    """Remove what the WikiHow half of HellaSwag left in its texts: ``[title]``, ``[step]``."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
