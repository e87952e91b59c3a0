"""Where the time of one token goes, kernel by kernel on a GPU, layer by layer on a CPU.

On a GPU kernels overlap: a kernel may start while the one before it drains. So each is given the
time by which it moves the end of the work forward, and what no kernel covers is a gap; the parts
then add up to the token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lutra.packed import packed_layers

#: Parts of a token by what a kernel's name contains, in the order in which they are tried.
_PARTS = (
    ("communication", r"nccl|AllReduce|all_reduce|token_sum"),
    ("norms", r"token_norm|layer_norm|rms_norm|RowwiseMoments"),
    ("attention", r"token_attention|flash|fmha|attention|softmax"),
    ("activation", r"token_activation|silu|relu"),
    (
        "linear",
        r"_linear|arrange|^code_|^place_|^flat_|^float_|dequantize|gemm|gemv|nvjet|cutlass|splitK"
        r"|cublas|xmma",
    ),
    ("choice of the token", r"ArgMax|argmax|reduce_kernel"),
)
OTHER = "other"


def part_of(kernel: str) -> str:
    """Which part of a token a kernel belongs to, by its name."""
    for part, pattern in _PARTS:
        if re.search(pattern, kernel):
            return part
    return OTHER


def profile_gpu(token: Callable[[], object], device: torch.device, repeats: int = 3) -> dict:
    """Profile calls of ``token``, each of which queues the work of one token.

    Returns:
        ``token_us``, ``parts`` (``{part: microseconds}``, gaps among them), ``share_not_linear``
        and ``kernels`` (``name``, ``part``, ``calls``, ``us``, largest first), all per token.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    token()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            token()
        torch.cuda.synchronize(device)
    events = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type == DeviceType.CUDA and e.time_range.end > e.time_range.start
    ]
    return summarize(events, repeats)


def summarize(events: list[tuple[float, float, str]], repeats: int) -> dict[str, Any]:
    """Parts of a token from ``(start, end, name)`` of all kernels of ``repeats`` tokens, in us."""
    kernels: dict[str, list[float]] = {}
    gaps = 0.0
    reached = min((start for start, _, _ in events), default=0.0)
    begin = reached
    for start, end, name in sorted(events):
        gaps += max(0.0, start - reached)
        forward = max(0.0, end - max(start, reached))
        reached = max(reached, end)
        entry = kernels.setdefault(name, [0.0, 0.0])
        entry[0] += 1
        entry[1] += forward
    parts: dict[str, float] = {}
    for name, (_, us) in kernels.items():
        parts[part_of(name)] = parts.get(part_of(name), 0.0) + us / repeats
    parts["gaps"] = gaps / repeats
    token = (reached - begin) / repeats
    rows = [
        {"name": name, "part": part_of(name), "calls": calls / repeats, "us": us / repeats}
        for name, (calls, us) in sorted(kernels.items(), key=lambda item: -item[1][1])
    ]
    return {
        "token_us": token,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "share_not_linear": 1 - parts.get("linear", 0.0) / token if token else 0.0,
        "kernels": rows,
    }


def profile_cpu(model: nn.Module, token: Callable[[], object], repeats: int = 3) -> dict[str, Any]:
    """Time of the modules of a model during ``token``, in the form of :func:`profile_gpu`.

    Modules are timed by themselves, without what they call; ``other`` is what lies between them.
    """
    spent: dict[str, list[float]] = {}
    stack: list[list[float]] = []

    def before(module: nn.Module, inputs: Any) -> None:
        stack.append([time.perf_counter(), 0.0])

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        begin, inside = stack.pop()
        seconds = time.perf_counter() - begin
        if stack:
            stack[-1][1] += seconds
        entry = spent.setdefault(type(module).__name__, [0.0, 0.0])
        entry[0] += 1
        entry[1] += (seconds - inside) * 1e6

    token()
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        begin = time.perf_counter()
        for _ in range(repeats):
            token()
        total = (time.perf_counter() - begin) * 1e6 / repeats
    finally:
        for handle in handles:
            handle.remove()
    linear = {"Linear", "Conv1D"} | {type(layer).__name__ for layer in packed_layers(model)}
    parts: dict[str, float] = {}
    rows = []
    for name, (calls, us) in sorted(spent.items(), key=lambda item: -item[1][1]):
        part = "linear" if name in linear else _cpu_part(name)
        parts[part] = parts.get(part, 0.0) + us / repeats
        rows.append({"name": name, "part": part, "calls": calls / repeats, "us": us / repeats})
    parts["gaps"] = max(0.0, total - sum(parts.values()))
    return {
        "token_us": total,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "share_not_linear": 1 - parts.get("linear", 0.0) / total,
        "kernels": rows,
    }


def _cpu_part(module: str) -> str:
    for word, part in (("Norm", "norms"), ("Attention", "attention"), ("MLP", "activation")):
        if word in module:
            return part
    return "activation" if module in ("SiLU", "ReLU", "SiLUActivation") else OTHER


def plot(profiles: dict[str, dict[str, Any]], path: Path) -> None:
    """One bar per profile, cut into its parts.

    Args:
        profiles: by name, as :func:`profile_gpu` returns them.
        path: file to write; its suffix says the kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    order = ["linear", "attention", "norms", "activation", "choice of the token", "communication",
             OTHER, "gaps"]  # fmt: skip
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(figsize=(8, 0.9 + 0.5 * len(profiles)))
    for row, profile in enumerate(profiles.values()):
        left = 0.0
        for index, part in enumerate(order):
            share = 100 * profile["parts"].get(part, 0.0) / profile["token_us"]
            if share:
                axes.barh(row, share, left=left, color=colours[index], height=0.6)
                if share > 6:
                    axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center")
                left += share
    axes.set_yticks(range(len(profiles)))
    axes.set_yticklabels(
        [f"{name}\n{p['token_us'] / 1000:.2f} ms" for name, p in profiles.items()], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("% of a token")
    axes.set_xlim(0, 100)
    handles = [patches.Rectangle((0, 0), 1, 1, color=colours[i]) for i in range(len(order))]
    axes.legend(handles, order, ncol=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
