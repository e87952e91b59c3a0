"""Plot of a kernel bench: how many times as fast as the dense product, by number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: Ours thick and first; colours keep their meaning from panel to panel.
COLOURS = {
    "lutra-ubcq": "#1f5fbf", "lutra-bcq": "#6fa8e8", "humming-kernels": "#dd6b20",
    "tinygemm": "#2f9e6e", "fbgemm-gpu-genai": "#b45fc9", "gemlite": "#a98a12",
    "bitsandbytes": "#c9485f",
}  # fmt: skip
OTHER = "#666666"
LABELS = {"lutra-ubcq": "lutra, uniform levels", "lutra-bcq": "lutra, free levels"}


def plot(rows: list[Row], path: Path) -> None:
    """A panel for each shape and width, a line for each implementation.

    Args:
        rows: as :func:`lutra.bench.kernel.run` returns them.
        path: file to write; its suffix says the kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot

    packed = [row for row in rows if row["speedup_vs_dense"] and 0 < row["bits"] < 16]
    shapes = list(dict.fromkeys(row["shape"] for row in packed))
    widths = sorted({row["bits"] for row in packed})
    names = [n for n in COLOURS if any(row["implementation"] == n for row in packed)]
    names += sorted({row["implementation"] for row in packed} - set(names))
    figure, grid = pyplot.subplots(
        len(widths), len(shapes), squeeze=False, sharex=True, sharey=True,
        figsize=(1.2 + 2.1 * len(shapes), 0.9 + 1.9 * len(widths)),
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for line, bits in enumerate(widths):
        for column, shape in enumerate(shapes):
            axes = grid[line][column]
            for name in reversed(names):
                found = sorted(
                    (row["batch"], row["speedup_vs_dense"])
                    for row in packed
                    if (row["implementation"], row["shape"], row["bits"]) == (name, shape, bits)
                )
                if found:
                    ours = name.startswith("lutra")
                    (handles[name],) = axes.plot(
                        *zip(*found, strict=True), marker="o", markersize=3 if ours else 2,
                        linewidth=2 if ours else 1, color=COLOURS.get(name, OTHER),
                    )  # fmt: skip
            axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.25)
            if line == 0:
                axes.set_title(shape.replace("x", " x "), fontsize=9)
            if column == 0:
                axes.set_ylabel(f"{bits} bits", fontsize=9)
            if line == len(widths) - 1:
                axes.set_xlabel("tokens", fontsize=8)
                ticks = sorted({row["batch"] for row in packed})
                axes.set_xticks(ticks, [str(t) for t in ticks], fontsize=7)
            axes.tick_params(labelsize=7)
    grid[0][0].set_ylim(bottom=0)
    shown = [name for name in names if name in handles]
    figure.legend(
        [handles[n] for n in shown], [LABELS.get(n, n) for n in shown], fontsize=8,
        ncols=min(len(shown), 2 * len(shapes)), loc="upper center", frameon=False,
    )  # fmt: skip
    figure.supylabel("times as fast as the dense product", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
