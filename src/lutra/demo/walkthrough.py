"""`lutra demo`: quantize the demo model in several ways, measure each, compare them on one page."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutra.errors import ResourceError

if TYPE_CHECKING:
    from rich.table import Table

MODEL = Path(__file__).parent / "model"
CONTEXT = 256
SAMPLES = 128
GROUP_SIZE = 128
# Says that a folder was made by the demo, so that the next run may replace it.
MARKER = ".lutra-demo"

# 16,320 predicted tokens; all models read the same windows, so small differences mean something.
WINDOWS = 64
# A sixth of the default's work, for a demo that takes minutes; more steps give a little more.
SHORT_TRAINING = {"reconstruct": True, "steps": 64, "batch": 4}


@dataclass(frozen=True)
class Variant:
    """One way to quantize: the row's name without the bits, a method and its options."""

    name: str
    method: str
    calibrated: bool = True
    options: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("rtn", "rtn", calibrated=False),
    Variant("gptq", "gptq"),
    Variant("awq", "awq"),
    Variant("lut-gemm", "lut-gemm"),
    Variant("lut-gemm reconstructed", "lut-gemm", options=SHORT_TRAINING),
)


def run(
    output: str | Path = "demo-output",
    *,
    bits: Sequence[int] = (4, 3, 2),
    variants: Sequence[Variant] = VARIANTS,
    samples: int = SAMPLES,
    max_windows: int = WINDOWS,
    on_stderr: bool = False,
) -> dict[str, Any]:
    """Quantize, evaluate, print a table, write ``report.html`` and ``results.json``.

    Args:
        output: folder for the results; one of an earlier demo is replaced.
        bits: widths to try, in the order of the rows.
        variants: methods to try.
        samples: calibration windows of 256 tokens.
        max_windows: evaluate on so many windows of 256 tokens.
        on_stderr: print the table to standard error instead of standard output.

    Returns:
        ``rows``: one dict a model with ``name``, ``method``, ``bits_per_weight`` (measured from
        the files), ``perplexity``, ``kl_mean`` (nats), ``top1_agreement``, ``size_bytes``,
        ``tokens_per_second`` (decoding, batch 1) and ``quantize_seconds``; ``report``: path of
        the page; ``seconds``.

    Raises:
        ResourceError: ``output`` exists and is not an earlier demo's.
        CalibrationError: this Python lacks the help topics that the text is made from.
    """
    from rich.console import Console

    from lutra.demo.text import calibration_text, held_out_text
    from lutra.evaluate.report import write_report

    started = time.perf_counter()
    progress = Console(stderr=True, highlight=False)
    folder = _fresh_folder(Path(output))
    text, calibration_file = folder / "evaluation.txt", folder / "calibration.txt"
    text.write_text(held_out_text(), "utf-8")
    calibration_file.write_text(calibration_text(), "utf-8")

    rows = [_measure("original", "original", MODEL, text, max_windows) | {"reference": True}]
    todo = [(variant, width) for width in bits for variant in variants]
    for number, (variant, width) in enumerate(todo, 1):
        name = f"{variant.name} {width} bit"
        with progress.status(f"{number} of {len(todo)}: {name}"):
            row = _quantize_and_measure(
                variant, width, name, folder / "models", calibration_file, text, samples,
                max_windows,
            )
        progress.print(
            f"{number:2} of {len(todo)}  {name}: perplexity {row['perplexity']:.2f}, "
            f"{row['quantize_seconds']:.1f} s"
        )
        rows.append(row)

    seconds = time.perf_counter() - started
    facts = {
        "model": "the demo model, a Llama of 2.75 M parameters (see lutra/demo/README.md)",
        "evaluation": f"held-out help topics, {max_windows} windows of {CONTEXT} tokens",
        "calibration": f"{samples} windows of {CONTEXT} tokens of the training text",
        "group size": GROUP_SIZE,
        "made by": "lutra demo",
    }
    page = write_report(
        rows, folder / "report.html", title="What low bits cost the demo model", facts=facts,
        intro="Each row is a checkpoint on disk that was loaded and measured. Speed is that of a "
        "model far too small to be limited by memory: it says nothing of larger ones.",
    )  # fmt: skip
    result = {"rows": rows, "report": str(page), "seconds": seconds}
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    results = Console(stderr=on_stderr, highlight=False)
    results.print(_table(rows), _LEGEND, sep="\n")
    progress.print(f"{seconds:.0f} s; the page with the plots: {page}")
    return result


def _fresh_folder(folder: Path) -> Path:
    if folder.exists():
        if not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise ResourceError(
                f"{folder} exists and was not made by the demo; name another folder, or remove it"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except OSError as error:
        raise ResourceError(
            f"can not make the folder {folder} ({error.strerror}); name another one"
        ) from error
    return folder


def _quantize_and_measure(
    variant: Variant, bits: int, name: str, models: Path, calibration: Path, text: Path,
    samples: int, max_windows: int,
) -> dict[str, Any]:  # fmt: skip
    from lutra.api import quantize

    destination = models / name.replace(" ", "-")
    begin = time.perf_counter()
    report = quantize(
        MODEL, destination, method=variant.method, bits=bits, group_size=GROUP_SIZE,
        calibration=calibration if variant.calibrated else None, samples=samples,
        seq_len=CONTEXT, options=variant.options,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    row = _measure(name, variant.name, destination, text, max_windows)
    # Errors of weights (no calibration) and of outputs do not belong in one plot.
    layers = {
        layer: {key: fact[key] for key in ("error", "error_of")}
        for layer, fact in report["layers"].items()
        if fact["error_of"] == "output"
    }
    return row | {"quantize_seconds": seconds, "layers": layers}


def _measure(
    name: str, method: str, model: Path, text: Path, max_windows: int
) -> dict[str, Any]:
    from lutra.bench.model import bench_model
    from lutra.evaluate import evaluate

    measured = evaluate(
        model, text=text, against=None if model == MODEL else MODEL, seq_len=CONTEXT,
        max_windows=max_windows,
    )  # fmt: skip
    speed = bench_model(model, prompt_len=32, new_tokens=32, repeats=2)
    kept = ("bits_per_weight", "perplexity", "kl_mean", "kl_p99", "top1_agreement", "size_bytes")
    row = {"name": name, "method": method} | {key: measured[key] for key in kept}
    return row | {"tokens_per_second": speed["tokens_per_second"]}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for head in ("bits", "perplexity", "KL", "top-1", "MB", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        kl, same = row["kl_mean"], row["top1_agreement"]
        table.add_row(
            row["name"], f"{row['bits_per_weight']:.2f}", f"{row['perplexity']:.2f}",
            "-" if kl is None else f"{kl:.4f}", "-" if same is None else f"{same:.1%}",
            f"{row['size_bytes'] / 1e6:.2f}", f"{row['tokens_per_second']:.0f}",
        )  # fmt: skip
    return table


_LEGEND = (
    "bits: stored bits per weight of the quantized layers, scales and offsets counted. KL: nats a "
    "token from the original. top-1: the original's first choice is also this model's. MB: all "
    "tensors, the 16-bit embeddings (0.79 MB) among them."
)
