"""The report's plots, as SVG text that lies in the page itself.

Text and axes take the page's text colour (``currentColor``), so a plot reads in light and in dark;
data colours have a middle lightness that shows on both. No plot needs a script or a file beside it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from lutra.errors import ResourceError

#: Colours of middle lightness, told apart by people with colour-blindness too; markers help.
_COLOURS = ("#2f86d8", "#dd6b20", "#2f9e6e", "#b45fc9", "#c9485f", "#a98a12", "#3f9fb0", "#888888")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
# matplotlib needs a colour where the page shall decide: this one is replaced in the SVG.
_INK = "#010203"
_WIDE, _HIGH = 6.4, 3.6


def plot_against_bits(
    rows: Sequence[Mapping[str, Any]], key: str, label: str, reference: float | None = None
) -> str:
    """A figure against measured bits per weight, one line for each method.

    Args:
        rows: comparison rows; those without ``bits_per_weight`` or ``key`` are left out, and so
            are those marked ``reference`` (they set the dashed line).
        key: the figure, such as ``perplexity``.
        label: the axis in words.
        reference: the original model's figure, drawn as a dashed line.

    Returns:
        SVG, or an empty string if no row has both figures.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        bits, value = row.get("bits_per_weight"), row.get(key)
        if row.get("reference") or not _is_number(bits) or not _is_number(value):
            continue
        series.setdefault(str(row.get("method") or row.get("name")), []).append((bits, value))
    if not series:
        return ""
    figure, axes = _figure()
    values = [value for points in series.values() for _, value in points]
    if reference is not None and _is_number(reference):
        axes.axhline(reference, color=_INK, linestyle=(0, (4, 3)), linewidth=1, alpha=0.7)
        values.append(reference)
        axes.annotate(
            f"original {plain(reference)}", (0, reference), xycoords=("axes fraction", "data"),
            xytext=(4, -4), textcoords="offset points", ha="left", va="top", color=_INK,
        )  # fmt: skip
    for index, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        style = {"color": _COLOURS[index % 8], "marker": _MARKERS[index % 8]}
        axes.plot(x, y, label=name, linewidth=1.6, markersize=6, **style)
    if min(values) > 0 and max(values) > 3 * min(values):
        _log_axis(axes, min(values), max(values))
    else:  # room below for the label of the dashed line
        spread = (max(values) - min(values)) or abs(max(values)) or 1.0
        axes.set_ylim(min(values) - 0.14 * spread, max(values) + 0.06 * spread)
    axes.set_xlabel("bits per weight, measured from the files")
    axes.set_ylabel(label)
    _legend(axes)
    return _svg(figure, f"{label} against bits per weight")


def plot_sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bytes of each model's tensors as horizontal bars; empty if no row has ``size_bytes``."""
    sized = [row for row in rows if _is_number(row.get("size_bytes"))]
    if not sized:
        return ""
    figure, axes = _figure(height=0.9 + 0.32 * len(sized))
    largest = max(row["size_bytes"] for row in sized)
    unit, scale = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6) if largest >= 1e6 else ("kB", 1e3)
    names = [str(row.get("name", "")) for row in sized]
    sizes = [row["size_bytes"] / scale for row in sized]
    colours = [_COLOURS[7] if row.get("reference") else _COLOURS[0] for row in sized]
    # Positions, not names: two rows of the same name are two bars.
    bars = axes.barh(range(len(sized)), sizes, color=colours, height=0.68)
    axes.set_yticks(range(len(sized)), [_shorten(name) for name in names])
    axes.bar_label(bars, [size_in_words(row["size_bytes"]) for row in sized], padding=4, color=_INK)
    axes.set_xlim(0, max(sizes) * 1.18)
    axes.invert_yaxis()
    axes.set_xlabel(f"size of all tensors, {unit}")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return _svg(figure, "size of each model")


def plot_layer_errors(layers: Mapping[str, float], of: str = "") -> str:
    """Relative error of each quantized layer, by block, one line for each kind of layer.

    Args:
        layers: error by the layer's full name.
        of: what the error is relative to, ``output`` or ``weight`` (:func:`error_of`).

    Returns:
        SVG, or an empty string if fewer than two layers lie in numbered blocks.
    """
    kinds: dict[str, list[tuple[int, float]]] = {}
    for name, error in layers.items():
        block = block_of(name)
        if block is not None and _is_number(error):
            kinds.setdefault(name.rpartition(".")[2], []).append((block, error))
    lines = [_Line(kind, points, index) for index, (kind, points) in enumerate(kinds.items())]
    return _by_block(lines, _error_label(of), "error of each layer")


def plot_block_errors(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean relative error of each block's layers, one line for each row that has layer errors.

    A method keeps the colour that it has in :func:`plot_against_bits`, and the rows of one method
    differ in the style of their lines.
    """
    colours = list(dict.fromkeys(str(row.get("method") or row.get("name")) for row in rows))
    methods: dict[str, int] = {}
    lines = []
    for row in rows:
        blocks: dict[int, list[float]] = {}
        for name, error in layer_errors(row).items():
            block = block_of(name)
            if block is not None:
                blocks.setdefault(block, []).append(error)
        if blocks:
            method = str(row.get("method") or row.get("name"))
            style = methods[method] = methods.get(method, -1) + 1
            points = [(b, sum(e) / len(e)) for b, e in sorted(blocks.items())]
            label = str(row.get("name") or method)
            lines.append(_Line(label, points, colours.index(method), style))
    label = _error_label(error_of(rows)) + ", mean of block"
    return _by_block(lines, label, "error of each block")


def layer_errors(row: Mapping[str, Any]) -> dict[str, float]:
    """The errors in a row's ``layers``, whether they are bare numbers or dicts with ``error``."""
    found = {}
    for name, fact in (row.get("layers") or {}).items():
        error = fact.get("error") if isinstance(fact, Mapping) else fact
        if _is_number(error):
            found[str(name)] = float(error)
    return found


def error_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """What all errors of some rows are of, ``output`` or ``weight``; empty if not the same."""
    facts = [fact for row in rows for fact in (row.get("layers") or {}).values()]
    named = {fact.get("error_of") for fact in facts if isinstance(fact, Mapping)}
    return str(named.pop() or "") if len(named) == 1 else ""


def _error_label(of: str) -> str:
    return f"relative {of} error" if of else "relative error"


def block_of(layer: str) -> int | None:
    """The number of the block that a layer's name says: 3 for ``model.layers.3.mlp.up_proj``."""
    match = re.search(r"\.(\d+)\.", layer)
    return int(match[1]) if match else None


def plain(value: float) -> str:
    """A number with three to four figures and no exponent where people read it."""
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    for limit, digits in ((100, 1), (10, 2), (1, 2), (0.1, 3), (0.001, 4)):
        if size >= limit:
            return f"{value:.{digits}f}"
    return "0" if value == 0 else f"{value:.1e}"


def size_in_words(count: float) -> str:
    """Bytes in decimal units: ``34.6 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{1 if count >= 10 * scale else 2}f} {unit}"
    return f"{count:.0f} B"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class _Line:
    """A line of a plot by block; ``colour`` and ``style`` count from 0."""

    label: str
    points: Sequence[tuple[int, float]]
    colour: int
    style: int = 0


def _by_block(lines: Sequence[_Line], label: str, title: str) -> str:
    if sum(len(line.points) for line in lines) < 2:
        return ""
    from matplotlib.ticker import MaxNLocator

    columns = _legend_columns([_shorten(line.label) for line in lines])
    figure, axes = _figure(height=_HIGH + 0.2 * (-(-len(lines) // columns) - 1))
    for line in lines:
        x, y = zip(*sorted(line.points), strict=True)
        axes.plot(
            x, y, label=_shorten(line.label), color=_COLOURS[line.colour % 8], linewidth=1.4,
            marker=_MARKERS[line.colour % 8], markersize=4.5, linestyle=_STYLES[line.style % 4],
        )  # fmt: skip
    values = [value for line in lines for _, value in line.points]
    if min(values) > 0 and max(values) > 10 * min(values):
        _log_axis(axes, min(values), max(values))
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    _legend(axes)
    return _svg(figure, title)


def _shorten(name: str, length: int = 34) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _figure(height: float = _HIGH) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ResourceError(
            f"the report's plots are drawn by matplotlib, which can not be imported ({error}). "
            'Install it: pip install "lutra[report]"'
        ) from error
    # Figure without pyplot: no global state, no display, safe in threads.
    figure = Figure(figsize=(_WIDE, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_INK)
        spine.set_alpha(0.5)
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.grid(color=_INK, alpha=0.13, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _log_axis(axes: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log")
    # Enough ticks to read values, few enough to keep labels apart: 1-2-5 up to two decades.
    steps = (1, 2, 5) if high / low <= 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    within = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    if high / low <= 4:  # less than an octave or two: 1-2-5 would leave one or two ticks
        within = [tick for p in powers for tick in (m * 10.0**p for m in range(1, 10))]
        within = [tick for tick in within if low / 1.3 <= tick <= high * 1.3]
    axes.set_ylim(low / 1.25, high * 1.25)
    axes.yaxis.set_major_locator(FixedLocator(within))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _legend_columns(labels: Sequence[str]) -> int:
    """Entries side by side above a plot: four at most, as many as its width holds."""
    room = _WIDE * 72 - 60  # points, without the axis on the left
    entry = 36 + 5.6 * max(map(len, labels), default=0)  # line, gaps and text at 9 points
    return max(1, min(int(room / entry), len(labels) if len(labels) <= 4 else 3))


def _legend(axes: Any) -> None:
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.01), ncols=_legend_columns(labels), frameon=False,
        fontsize=9, borderaxespad=0, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(_INK)


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Text stays text (it can be searched and read aloud); a fixed salt and no date make the same
    # rows give the same bytes.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # Several plots share a page, and ids must not meet; the page decides the width.
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()
