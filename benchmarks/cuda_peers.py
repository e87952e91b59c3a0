"""Tables and plot of the CUDA kernels beside their peers, from one run of the bench.

    lutra bench kernel --device cuda --batch 1,2,4,8,16,32,64,128 --bits 2,3,4 \
        --shape 49152x12288,28672x8192,12288x12288,14336x4096,4096x4096 --json
    python benchmarks/cuda_peers.py benchmarks/results/cuda_peers.json docs

writes ``docs/cuda-peers.svg`` and prints Markdown: microseconds of all, the factor to the fastest
peer of the same or more bits, and the bars. Marlin and Machete come from runs of their own
(``cuda_marlin_machete.json``), as their ratio to humming int4, which is in every run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lutra.bench.kernel_plot import plot

Row = dict[str, Any]
Key = tuple[str, int, str, int]  # implementation, bits, shape, tokens
ELSEWHERE = Path(__file__).parent / "results" / "cuda_marlin_machete.json"
OURS = ("lutra-ubcq", "lutra-bcq")
READ_SHARE = {"49152x12288": 92, "28672x8192": 80, "12288x12288": 80, "14336x4096": 60}
AGAINST_DENSE = {1: 4.4, 16: 3.5, 64: 2.5, 128: 1.45}
AGAINST_HUMMING = 1.5


def label(name: str, bits: int) -> str:
    return {
        "cublas": "cuBLAS float16", "lutra-ubcq": f"**ubcq{bits}**", "lutra-bcq": f"**bcq{bits}**",
        "humming-kernels": f"humming int{bits}", "tinygemm": "tinygemm int4",
        "fbgemm-gpu-genai": "FBGEMM int4", "bitsandbytes": "bitsandbytes nf4",
        "gemlite": f"gemlite int{bits}",
    }.get(name, name)  # fmt: skip


def times(rows: list[Row]) -> dict[Key, float]:
    """Microseconds; with those of Marlin and Machete as far as humming int4 was measured."""
    found = {
        (row["implementation"], row["bits"], row["shape"], row["batch"]): row["us"] for row in rows
    }
    for row in json.loads(ELSEWHERE.read_text())["rows"]:
        humming = found.get(("humming-kernels", 4, row["shape"], row["batch"]))
        if humming is not None:
            key = (row["implementation"], 4, row["shape"], row["batch"])
            found[key] = row["us"] * humming / row["humming_int4_us"]
    return found


def columns(rows: list[Row]) -> tuple[list[str], list[int]]:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    return shapes, sorted({row["batch"] for row in rows})


def table(rows: list[Row]) -> Iterator[str]:
    """Microseconds of every implementation."""
    shapes, batches = columns(rows)
    us = times(rows)
    yield f"| shape | | {' | '.join(map(str, batches))} |"
    yield "|---" * (len(batches) + 2) + "|"
    for shape in shapes:
        lines = list(dict.fromkeys((k[1], k[0]) for k in us if k[2] == shape))
        order = ["cublas", *OURS, "humming-kernels", "gemlite"]
        lines.sort(key=lambda line: (
            line[1] != "cublas", line[0],
            order.index(line[1]) if line[1] in order else len(order), line[1],
        ))  # fmt: skip
        for index, (bits, name) in enumerate(lines):
            cells = [us.get((name, bits, shape, n)) for n in batches]
            shown = ["-" if c is None else f"{c:.1f}" if c < 100 else f"{c:.0f}" for c in cells]
            first = shape.replace("x", " x ") if index == 0 else ""
            yield f"| {first} | {label(name, bits)} | {' | '.join(shown)} |"


def factors(rows: list[Row]) -> Iterator[tuple[Key, float, Key]]:
    """Ours, how many times as fast as the fastest peer of as many or more bits, and that peer."""
    us = times(rows)
    for key, mine in us.items():
        name, bits, shape, tokens = key
        if name in OURS:
            peers = {
                k: v for k, v in us.items()
                if k[0] not in (*OURS, "cublas") and k[1] >= bits and k[2:] == (shape, tokens)
            }  # fmt: skip
            if peers:
                best = min(peers, key=lambda k: peers[k])
                yield key, peers[best] / mine, best


def factor_table(rows: list[Row]) -> Iterator[str]:
    shapes, batches = columns(rows)
    found = {key: (factor, peer) for key, factor, peer in factors(rows)}
    yield f"| shape | | {' | '.join(map(str, batches))} |"
    yield "|---" * (len(batches) + 2) + "|"
    for shape in shapes:
        for index, (name, bits) in enumerate((n, b) for n in OURS for b in (2, 3, 4)):
            cells = []
            for tokens in batches:
                factor, peer = found.get((name, bits, shape, tokens), (None, None))
                if factor is None or peer is None:
                    cells.append("-")
                    continue
                words = label(peer[0], peer[1]).replace("humming int", "h")
                text = f"{factor:.2f} {words}"
                cells.append(text if factor >= 1 else f"*{text}*")
            first = shape.replace("x", " x ") if index == 0 else ""
            yield f"| {first} | {name.removeprefix('lutra-')}{bits} | {' | '.join(cells)} |"


def bars(rows: list[Row], limit: float) -> Iterator[str]:
    """What was asked, what was measured, whether it is met."""
    table_ = {(r["implementation"], r["bits"], r["shape"], r["batch"]): r for r in rows}
    yield "| asked | measured: ubcq 2 / 3 / 4 bits; bcq 2 / 3 / 4 bits | |"
    yield "|---|---|---|"

    def line(asked: str, values: list[list[tuple[str, bool]]]) -> str:
        text = "; ".join(" / ".join(value for value, _ in kind) for kind in values)
        met = sum(ok for kind in values for _, ok in kind)
        every = sum(len(kind) for kind in values)
        return f"| {asked} | {text} | {'met' if met == every else f'{met} of {every}'} |"

    def each(batch: int, shape: str, widths: tuple[int, ...], value: Any) -> Any:
        return [
            [value(table_[name, b, shape, batch]) for b in widths
             if (name, b, shape, batch) in table_]
            for name in OURS
        ]  # fmt: skip

    for shape, least in READ_SHARE.items():
        yield line(
            f"1 token, {shape}: at least {least} % of the read limit",
            each(1, shape, (2, 3, 4), lambda r, least=least: (
                f"{100 * r['gbps'] / limit:.1f}", 100 * r["gbps"] / limit >= least)),
        )  # fmt: skip
    yield line(
        "1 token, 4096x4096: at most 5.5 us at 3 bits",
        each(1, "4096x4096", (3,), lambda r: (f"{r['us']:.2f} us", r["us"] <= 5.5)),
    )
    for batch, least in AGAINST_DENSE.items():
        tokens_ = f"{batch} token{'s' * (batch > 1)}"
        yield line(
            f"{tokens_}, 49152x12288, 3 bits: at least {least} times cuBLAS float16",
            each(batch, "49152x12288", (3,), lambda r, least=least: (
                f"{r['speedup_vs_dense']:.2f}", r["speedup_vs_dense"] >= least)),
        )  # fmt: skip
    for bits in (3, 2):

        def ratio(r: Row, bits: int = bits) -> tuple[str, bool]:
            other = table_.get(("humming-kernels", bits, r["shape"], 1))
            value = other["us"] / r["us"] if other else 0.0
            return f"{value:.2f}", value >= AGAINST_HUMMING

        shapes, _ = columns(rows)
        kinds: list[list[tuple[str, bool]]] = [[], []]
        for shape in shapes:
            for kind, found in zip(kinds, each(1, shape, (bits,), ratio), strict=True):
                kind += found
        yield line(
            f"1 token: at least {AGAINST_HUMMING} times humming int{bits}, all shapes", kinds
        )
    found = list(factors(rows))
    for tokens in columns(rows)[1]:
        text, won, places = [], 0, 0
        for name in OURS:
            for bits in (2, 3, 4):
                mine = [f >= 1 for k, f, _ in found if k[:2] == (name, bits) and k[3] == tokens]
                won, places = won + sum(mine), places + len(mine)
                text.append(f"{name.removeprefix('lutra-')}{bits} {sum(mine)}/{len(mine)}")
        asked = f"{tokens} token{'s' * (tokens > 1)}: faster than every peer; shapes won"
        met = "met" if won == places else f"{won} of {places}"
        yield f"| {asked} | {', '.join(text)} | {met} |"
    worst = max(
        (r["relative_error"] / r["rounding_error"], r["kernel"])
        for r in rows if r["implementation"] in OURS and r["rounding_error"]
    )  # fmt: skip
    met = "met" if worst[0] <= 1.2 else "MISSED"
    asked = "relative error at most 1.2 times that of rounding"
    yield f"| {asked} | at most {worst[0]:.3f} ({worst[1]}) | {met} |"


def main(source: Path, folder: Path) -> None:
    content = json.loads(source.read_text(encoding="utf-8"))
    rows, limit = content["rows"], content["read_limit_gbps"]
    plot(rows, folder / "cuda-peers.svg")
    for part in (bars(rows, limit), table(rows), factor_table(rows)):
        print("\n".join(part), end="\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
