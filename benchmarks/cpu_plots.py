"""Plots of benchmarks/results/cpu_kernels.json and cpu_model.json for docs/performance-cpu.md.

    python benchmarks/cpu_plots.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS = {"lutra": "C0", "lutra-fast": "C9"}
PEERS = {"onnxruntime": "C1", "openvino": "C2", "auto-round-lib": "C3", "torch-int4pack": "C4"}
SHAPE = "4096x4096"


def rows_of(runs: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    rows = [row for run in runs for row in run["rows"]]
    return [r for r in rows if all(r[key] == value for key, value in wanted.items())]


def finish(name: str) -> None:
    plt.grid(alpha=0.3, which="both")
    plt.tight_layout()
    plt.savefig(DOCS / name, metadata={"Date": None})
    plt.close()


def against_bits(run: dict[str, Any]) -> None:
    plt.figure(figsize=(6.4, 4))
    for name, color in (OURS | PEERS).items():
        rows = sorted(rows_of([run], implementation=name), key=lambda r: r["bits"])
        style = "o-" if name in OURS else "s--"
        plt.plot([r["bits"] for r in rows], [r["us"] for r in rows], style, color=color, label=name)
    one = rows_of([run], implementation="lutra", bits=1)[0]
    # What reading the stored bytes takes at the speed of a plain read in the same run.
    bits = range(1, 5)
    stored = [4096 * 4096 / 8 * b + 4096 * 32 * 2 * (b + 1) for b in bits]
    speed = one["gbps"] / one["fraction_of_read_limit"]
    plt.plot(bits, [s / speed / 1e3 for s in stored], "k:", label="plain read")
    plt.xlabel("bits per weight")
    plt.ylabel("microseconds of CPU time")
    plt.title(f"{SHAPE}, one row, one thread, weights cold")
    plt.legend(fontsize=8)
    plt.ylim(0)
    finish("cpu-bits.svg")


def against_batch(runs: list[dict[str, Any]], bits: int = 2) -> None:
    plt.figure(figsize=(6.4, 4))
    for name, color in ({"torch": "k", "lutra-bf16": "C5"} | OURS | PEERS).items():
        rows = rows_of(runs, implementation=name, bits=16 if name == "torch" else bits)
        best: dict[int, float] = {}
        for row in rows:  # of two runs the first
            best.setdefault(row["batch"], row["us"] / row["batch"])
        if not best:
            continue
        label = "torch bfloat16, dense" if name == "torch" else name
        style = "s--" if name in PEERS else "o-"
        plt.plot(sorted(best), [best[b] for b in sorted(best)], style, color=color, label=label)
    plt.xscale("log", base=2)
    plt.xticks([1, 4, 128], ["1", "4", "128"])
    plt.yscale("log")
    plt.xlabel("rows")
    plt.ylabel("microseconds of CPU time per row")
    plt.title(f"{SHAPE}, {bits} bits, one thread")
    plt.legend(fontsize=8)
    finish("cpu-batch.svg")


def whole_model(decodes: list[dict[str, Any]]) -> None:
    plt.figure(figsize=(6.4, 3))
    names = [row["implementation"] for row in decodes[0]["rows"]]
    for i, run in enumerate(decodes):
        threads = run["machine"]["threads"]
        height = [1000 / row["ms_per_token"] for row in run["rows"]]
        places = [n + 0.38 * (i - 0.5) for n in range(len(names))]
        bars = plt.barh(places, height, 0.36, color=f"C{i}", label=f"{threads} threads")
        plt.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    plt.yticks(range(len(names)), [n.replace(", ", ",\n", 1) for n in names], fontsize=8)
    plt.gca().invert_yaxis()
    plt.xlabel("tokens per second, Llama-3-8B shape, 2 bits")
    plt.legend(fontsize=8)
    finish("cpu-model.svg")


def main() -> None:
    runs = json.loads((RESULTS / "cpu_kernels.json").read_text())["runs"]
    model = json.loads((RESULTS / "cpu_model.json").read_text())
    with_peers = [r for r in runs if "--peers all" in r["command"]]
    against_bits(next(r for r in with_peers if r["rows"][0]["batch"] == 1))
    against_batch(with_peers)
    whole_model(model["decode"])


if __name__ == "__main__":
    main()
