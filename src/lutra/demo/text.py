"""The demo's text: Python's own reference topics and standard-library docstrings.

Nothing is stored with the package: the text is read from the Python that runs, from
``pydoc_data.topics`` (the pages behind ``help("with")``) and, with `ast` and without importing
anything, from the docstrings in the standard library's sources. The order is fixed, so one Python
version always gives the same text. Between versions the topics change by a few percent, the names
of the topics held out for evaluation do not.

A paragraph of the training text that repeats an earlier one, or that shares any run of
`OVERLAP_WORDS` words with a held-out topic, is left out: the reference manual quotes itself.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

from lutra.errors import CalibrationError

HELD_OUT_TOPICS = (
    "assignment", "calls", "comparisons", "import", "raise", "string-methods", "typesmapping",
)
OVERLAP_WORDS = 8
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def held_out_text() -> str:
    """The evaluation text: whole topics that no training paragraph overlaps.

    Raises:
        CalibrationError: this Python ships without (some of) the topics.
    """
    missing = [name for name in HELD_OUT_TOPICS if name not in topics]
    if missing:
        raise CalibrationError(
            f"pydoc_data.topics of this Python lacks {', '.join(missing)}: the demo's evaluation "
            "text is made from them; use a complete Python installation (on Debian and Ubuntu: "
            "the package libpython3-stdlib)"
        )
    return "\n\n".join(topics[name].strip() for name in HELD_OUT_TOPICS) + "\n"


def training_documents() -> list[str]:
    """Topics, then one document per standard-library module, in alphabetical order."""
    return _without_overlap((*_topic_texts(), *_module_texts()))


def calibration_text() -> str:
    """What a quantizer may look at: the topics of the training text, some 290 kB.

    The docstrings are left out only because parsing the standard library takes seconds.
    """
    return "\n".join(_without_overlap(_topic_texts()))


def _without_overlap(texts: Iterable[str]) -> list[str]:
    held_out = set(_runs(held_out_text()))
    seen: set[str] = set()
    documents = []
    for text in texts:
        kept = []
        for paragraph in text.split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen and held_out.isdisjoint(_runs(paragraph)):
                seen.add(key)
                kept.append(paragraph.strip("\n"))
        if kept:
            documents.append("\n\n".join(kept) + "\n")
    return documents


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = text.split()
    for start in range(len(words) - OVERLAP_WORDS + 1):
        yield tuple(words[start : start + OVERLAP_WORDS])


def _topic_texts() -> Iterator[str]:
    for name in sorted(topics):
        if name not in HELD_OUT_TOPICS:
            yield topics[name]


def _module_texts() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        top_level = relative.parts[0].removesuffix(".py")
        if top_level not in sys.stdlib_module_names or _SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and samples that are not meant to parse
            continue
        docstrings = [
            docstring
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (docstring := ast.get_docstring(node))
        ]
        if docstrings:
            yield "\n\n".join(docstrings)
