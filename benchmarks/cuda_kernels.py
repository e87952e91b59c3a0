"""Plot and table of the CUDA kernels, from the JSON of `lutra bench kernel --device cuda --json`.

    python benchmarks/cuda_kernels.py benchmarks/results/cuda_kernels.json docs

writes ``docs/cuda-decode.svg`` (one token: fraction of the streaming-read limit) and prints the
bars that the kernels are held against.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

Row = dict[str, Any]
COLOURS = ("#2f86d8", "#dd6b20", "#2f9e6e", "#b45fc9", "#c9485f", "#a98a12", "#3f9fb0", "#888888")


def rows_of(content: dict[str, Any]) -> Iterator[Row]:
    for run in content["runs"]:
        for row in run["rows"]:
            yield row | {"limit": run["read_limit_gbps"]}


def name_of(row: Row) -> str:
    bits = "" if row["implementation"] == "cublas" else f" {row['bits']} bit"
    return f"{row['implementation'].removeprefix('lutra-')}{bits}"


def decode(rows: Iterable[Row], path: Path) -> None:
    """Stored bytes over time, as a fraction of the read limit of the same run, for one token."""
    ours = [r for r in rows if r["batch"] == 1 and r["implementation"].startswith("lutra")]
    shapes = list(dict.fromkeys(r["shape"] for r in ours))
    series = sorted({name_of(r) for r in ours})
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    width = 0.8 / len(series)
    for i, name in enumerate(series):
        values = {r["shape"]: 100 * r["gbps"] / r["limit"] for r in ours if name_of(r) == name}
        places = [s + (i - (len(series) - 1) / 2) * width for s in range(len(shapes))]
        heights = [values.get(shape, 0) for shape in shapes]
        axes.bar(places, heights, width, label=name, color=COLOURS[i % len(COLOURS)])
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("% of the streaming-read limit")
    axes.set_ylim(0, 110)
    axes.legend(ncols=len(series), fontsize=7, loc="upper center", frameon=False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def bars(rows: Iterable[Row]) -> Iterator[str]:
    """What was asked of the kernels, as far as rows say whether it is met."""
    table = {(r["implementation"], r["shape"], r["batch"], r["bits"]): r for r in rows}
    asked = {"49152x12288": 92, "28672x8192": 80, "12288x12288": 80, "14336x4096": 60}
    for (name, shape, batch, bits), row in table.items():
        share = 100 * row["gbps"] / row["limit"]
        if name.startswith("lutra") and batch == 1 and shape in asked:
            met = "met" if share >= asked[shape] else "MISSED"
            yield f"{name}{bits} {shape}: {share:.1f} % of the read limit, {asked[shape]}: {met}"
        if name.startswith("lutra") and shape == "4096x4096" and batch == 1 and bits == 3:
            yield f"{name}3 {shape}: {row['us']} us, 5.5: {'met' if row['us'] <= 5.5 else 'MISSED'}"
    least = {1: 4.4, 16: 3.5, 64: 2.5, 128: 1.45, 256: 1.1, 512: 0.95, 1024: 0.95, 4096: 0.95}
    for (name, shape, batch, bits), row in table.items():
        if name.startswith("lutra") and shape == "49152x12288" and bits == 3 and batch in least:
            speed = row["speedup_vs_dense"]
            met = "met" if speed >= least[batch] else "MISSED"
            yield f"{name}3 batch {batch}: {speed} x cuBLAS, {least[batch]}: {met}"
    for (name, shape, batch, bits), row in table.items():
        if name.startswith(("lutra", "cublas")) or batch > 128:
            continue
        for kind in ("lutra-bcq", "lutra-ubcq"):
            for fewer in range(2, bits + 1):
                mine = table.get((kind, shape, batch, fewer))
                if mine is not None and mine["us"] >= row["us"]:
                    yield (
                        f"{kind}{fewer} {shape} batch {batch}: {mine['us']} us, "
                        f"{name}{bits} {row['us']}: SLOWER"
                    )


def main(source: Path, folder: Path) -> None:
    rows = list(rows_of(json.loads(source.read_text(encoding="utf-8"))))
    decode(rows, folder / "cuda-decode.svg")
    print("\n".join(bars(rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
