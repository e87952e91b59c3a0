"""What a quantization would give and need, known before it starts: from headers alone.

Sizes are exact: the tensors that will be written have shapes that follow from the format. Memory is
an estimate of the walk through the model (:mod:`lutra.runner.walk`), part by part, so that a run
that can not end well is known before it starts; each part says what it counts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from lutra.architectures import Architecture, architecture_of, is_linear, meta_model
from lutra.errors import CheckpointError, ResourceError, SchemeError
from lutra.formats.checkpoint import SourceCheckpoint, stored_tensor_shapes
from lutra.methods import get_method
from lutra.scheme import Format

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
}  # fmt: skip

#: Python, torch, transformers and the empty module tree (measured on x86-64 Linux).
_PROGRAM_BYTES = 420_000_000
#: What short-lived tensors leave in the allocator. With it, estimates come within 15 % of measured
#: peaks: rtn and gptq (64 x 1024 tokens) on wiki-llama-63m 0.66 and 1.50 GB, rtn on a Llama of 2048
#: channels 1.17 GB.
_ALLOCATOR = 1.3
#: A matrix that is being solved: int64 codes and their parts, float32 weights and temporaries.
_SOLVER_BYTES_PER_WEIGHT = 24
#: The walk runs about this many tokens through a block at a time.
_TOKENS_PER_BATCH = 8192
#: Samples that also run through the original model when the method does not ask for all of them.
_TRACKED_SAMPLES = 8
#: A run is impossible when it needs this many times the memory there is: the estimate is rough.
_MEMORY_SLACK = 1.5


@dataclass(frozen=True)
class Linear:
    """A linear layer of the checkpoint.

    Attributes:
        name: in the module tree.
        stored: name of its weight in the file.
        block: index of its block, or None for the head.
        out_features, in_features: its shape.
    """

    name: str
    stored: str
    block: int | None
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def plan(
    src: str | Path | SourceCheckpoint,
    method: str = "lut-gemm",
    bits: int = 3,
    group_size: int = 128,
    *,
    kind: str = "",
    serve_bits: Sequence[int] = (),
    lm_head_bits: int = 0,
    samples: int = 128,
    seq_len: int = 1024,
    options: Mapping[str, Any] | None = None,
    budget: str | int | None = None,
    context: int = 2048,
    dst: str | Path | None = None,
) -> dict[str, Any]:
    """Say what quantizing ``src`` gives and needs. No weights are read.

    Args:
        src: folder, hub id, or an open checkpoint.
        method: name of the method.
        bits: width of the weights; ``budget`` chooses it instead.
        group_size: inputs per group, -1 for one group per row.
        kind: kind of format; empty for the method's default.
        serve_bits: lower precisions that the file shall serve too.
        lm_head_bits: width of the head; 0 leaves it as it is.
        samples, seq_len: calibration windows and their length in tokens.
        options: the method's own options.
        budget: memory for running the result, weights and KV cache of ``context`` tokens, as bytes
            or like ``"24GB"`` (10^9) or ``"24GiB"`` (2^30). Then the most bits that fit are chosen.
        context: tokens of the KV cache.
        dst: where the result shall lie, to look at that disk; beside the working folder otherwise.

    Returns:
        A table that JSON can hold: ``layers``, ``bits_per_weight``, ``output_bytes``,
        ``run_bytes``, ``memory``, ``disk``, ``reason`` of the bits, ``problems`` (what makes the
        run impossible) and ``warnings``.

    Raises:
        CheckpointError: the source is damaged or not of its family's shape.
        SchemeError: a method, option or width that does not exist.
        ResourceError: nothing fits the budget.
    """
    chosen = get_method(method)
    parsed = chosen.parse_options(options or {})
    kind = kind or chosen.formats[0]
    if kind not in chosen.formats:
        raise SchemeError(f"method {method} writes {', '.join(chosen.formats)}, not {kind!r}")
    checkpoint = src if isinstance(src, SourceCheckpoint) else SourceCheckpoint.open(src)
    architecture = architecture_of(checkpoint.config)
    if chosen.scope != "layer" and not architecture.known:
        raise SchemeError(
            f"method {method} needs a family with an entry in lutra.architectures, and "
            f"{architecture.family!r} has none; layer-wise methods such as rtn and gptq work"
        )
    linears = linears_of(checkpoint, architecture)
    kv_bytes = _kv_cache_bytes(checkpoint, architecture, context)

    def size(width: int) -> _Size:
        serve = tuple(sorted({b for b in serve_bits if b < width}))
        block_format = Format(kind, width, group_size, serve_bits=serve)
        head_format = Format(kind, lm_head_bits, group_size) if lm_head_bits else None
        return _size(checkpoint, architecture, linears, block_format, head_format)

    reason = "asked for"
    if budget is None:
        wrong = [b for b in serve_bits if b > bits]
        if wrong:
            raise SchemeError(f"a {bits}-bit file can not serve {wrong[0]} bits")
        result = size(bits)
    else:
        limit = parse_bytes(budget)
        sizes = [size(width) for width in range(8, 0, -1)]
        fitting = [s for s in sizes if s.output_bytes + kv_bytes <= limit]
        if not fitting:
            smallest = sizes[-1]
            raise ResourceError(
                f"nothing fits into {_in_words(limit)}: at 1 bit the weights take "
                f"{_in_words(smallest.output_bytes)} ({_in_words(smallest.kept_bytes)} of them "
                f"embeddings and other unquantized parts) and the KV cache of {context} tokens "
                f"{_in_words(kv_bytes)}. Shorten the context (--context), quantize a head that is "
                "not tied (--lm-head-bits), or take a larger budget."
            )
        result = fitting[0]
        reason = (
            f"the most bits whose weights ({_in_words(result.output_bytes)}) and KV cache of "
            f"{context} tokens ({_in_words(kv_bytes)}) fit into {_in_words(limit)}"
        )
    needs = chosen.needs(parsed)
    memory = _memory(checkpoint, architecture, linears, needs, samples, seq_len)
    peak = sum(memory.values())
    available, available_reason = available_memory()
    disk = result.output_bytes + (memory["activations"] if needs else 0)
    place = _existing_parent(Path(dst) if dst is not None else Path.cwd() / "x")
    free = shutil.disk_usage(place).free
    problems: list[str] = []
    warnings: list[str] = []
    if disk > free:
        problems.append(
            f"the run writes {_in_words(disk)} and the disk of {place} has {_in_words(free)} free"
        )
    if available is not None and peak > available:
        text = (
            f"the run needs about {_in_words(peak)} of memory and {_in_words(available)} are "
            f"there ({available_reason}); fewer --samples or a shorter --seq-len need less"
        )
        (problems if peak > available * _MEMORY_SLACK else warnings).append(text)
    if not architecture.known:
        warnings.append(
            f"family {architecture.family!r} has no entry of its own: every linear layer of a "
            "block is quantized by itself, and nothing is folded"
        )
    if kind == "flat" and bits == 4 and budget is None:
        widest = size(8)
        warnings.append(
            f"method {method} chooses 4 or 8 bits for each group of layers by what they lose; "
            "sizes here are those of 4 bits throughout, and with 8 bits the output takes "
            f"{_in_words(widest.output_bytes)}"
        )
    weights = sum(layer["weights"] for layer in result.layers)
    return {
        "source": str(checkpoint.path),
        "family": architecture.family,
        "family_known": architecture.known,
        "method": method,
        "format": str(result.format),
        "bits": result.format.bits,
        "group_size": group_size,
        "reason": reason,
        "parameters": _parameters(checkpoint),
        "layers": result.layers,
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in result.layers) / weights,
        "source_bytes": checkpoint.total_bytes(),
        "output_bytes": result.output_bytes,
        "kept_bytes": result.kept_bytes,
        "run_bytes": result.output_bytes + kv_bytes,
        "kv_cache_bytes": kv_bytes,
        "context": context,
        "memory": {
            "peak_bytes": peak,
            "parts": memory,
            "available_bytes": available,
            "available_reason": available_reason,
        },
        "disk": {"needed_bytes": disk, "free_bytes": free},
        "problems": problems,
        "warnings": warnings,
    }


def linears_of(checkpoint: SourceCheckpoint, architecture: Architecture) -> list[Linear]:
    """Every linear layer of the blocks in order, and the head last, with shapes from the headers.

    Raises:
        CheckpointError: one is missing or has not two dimensions, or there are no blocks.
    """
    linears = []
    for index, name in _block_linears(checkpoint, architecture):
        linears.append(_linear(checkpoint, name, index, architecture.transposed))
    if not linears:
        raise CheckpointError(
            f"{checkpoint.path} has no decoder blocks {architecture.blocks}.0, .1 and so on, "
            f"which a {architecture.family} model has"
        )
    # The head is an ordinary linear also in families whose blocks store [in, out].
    linears.append(_linear(checkpoint, architecture.head, None, transposed=False))
    return linears


def _block_linears(
    checkpoint: SourceCheckpoint, architecture: Architecture
) -> Iterator[tuple[int, str]]:
    if not architecture.known:
        blocks = meta_model(checkpoint.config).get_submodule(architecture.blocks)
        for number, block in enumerate(blocks.children()):
            for name, module in block.named_modules():
                if is_linear(module):
                    yield number, f"{architecture.blocks}.{number}.{name}"
        return
    config = checkpoint.config
    count = config.get("num_hidden_layers") or config.get("n_layer")
    index = 0
    while count is None or index < count:
        path = f"{architecture.blocks}.{index}"
        first = checkpoint.resolve(f"{path}.{architecture.linears[0]}.weight")
        if count is None and first is None:
            return
        for name in architecture.linears:
            yield index, f"{path}.{name}"
        index += 1


def _linear(checkpoint: SourceCheckpoint, name: str, block: int | None, transposed: bool) -> Linear:
    stored = checkpoint.resolve(f"{name}.weight")
    if stored is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tensor '{name}.weight', which its config.json implies. "
            "Is a shard missing?"
        )
    shape = checkpoint.shape(stored)
    if len(shape) != 2:
        raise CheckpointError(
            f"tensor {stored!r} of {checkpoint.path} has shape {list(shape)}; a linear layer has "
            "two dimensions"
        )
    out_features, in_features = reversed(shape) if transposed else shape
    return Linear(name, stored, block, out_features, in_features)


@dataclass(frozen=True)
class _Size:
    format: Format
    layers: list[dict[str, Any]]
    kept_bytes: int
    output_bytes: int


def _size(
    checkpoint: SourceCheckpoint,
    architecture: Architecture,
    linears: list[Linear],
    block_format: Format,
    head_format: Format | None,
) -> _Size:
    layers: list[dict[str, Any]] = []
    replaced: set[str] = set()
    for linear in linears:
        format = head_format if linear.block is None else block_format
        if format is None:
            continue
        shapes = stored_tensor_shapes(format, linear.out_features, linear.in_features)
        stored_bytes = sum(prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
        layers.append(
            {
                "name": linear.name,
                "format": str(format),
                "out_features": linear.out_features,
                "in_features": linear.in_features,
                "weights": linear.weights,
                "bytes": stored_bytes,
                "bits_per_weight": 8 * stored_bytes / linear.weights,
            }
        )
        # A tied head that is quantized leaves the embedding, whose weight it shared.
        if linear.block is not None or not checkpoint.tied_head:
            replaced.add(linear.stored)
    kept = sum(checkpoint.nbytes(n) for n in checkpoint.names() if n not in replaced)
    total = kept + sum(layer["bytes"] for layer in layers)
    return _Size(block_format, layers, kept, total)


def _memory(
    checkpoint: SourceCheckpoint,
    architecture: Architecture,
    linears: list[Linear],
    needs: frozenset[str],
    samples: int,
    seq_len: int,
) -> dict[str, int]:
    """Estimated peak of the walk on CPU, in bytes by part."""
    from lutra.runner.stream import compute_dtype

    in_blocks = [x for x in linears if x.block is not None]
    head = linears[-1]
    width = head.in_features
    by_block: dict[int, int] = {}
    for linear in in_blocks:
        assert linear.block is not None
        by_block[linear.block] = by_block.get(linear.block, 0) + linear.weights
    stored = checkpoint.dtype(in_blocks[0].stored)
    itemsize, run_itemsize = stored.itemsize, compute_dtype(stored, torch.device("cpu"))[0].itemsize
    widest = max(in_blocks, key=lambda x: x.in_features)
    # As read, as run, and as the method sees it (float32).
    block = max(by_block.values()) * (itemsize + run_itemsize + 4)
    # As many matrices as there are threads are solved at a time, the largest first.
    sizes = sorted((x.weights for x in in_blocks if x.block == in_blocks[0].block), reverse=True)
    solver = sum(sizes[: torch.get_num_threads()]) * _SOLVER_BYTES_PER_WEIGHT
    activations = forward = hessians = 0
    if needs:
        original = samples if needs & {"shift", "block"} else min(samples, _TRACKED_SAMPLES)
        # One batch of the next state is made while the last still stands.
        activations = (samples * 2 + original) * seq_len * width * run_itemsize
        forward = min(_TOKENS_PER_BATCH, samples * seq_len) * widest.in_features * 4 * 4
        firsts = {group[0] for group in architecture.groups}
        block_path = f"{architecture.blocks}.{in_blocks[0].block}."
        grams = [
            4 * x.in_features**2 for x in in_blocks if x.name.removeprefix(block_path) in firsts
        ]
        # Sums and means of every group, and the largest three times in float64 while it is solved.
        hessians = 2 * sum(grams) * (2 if "shift" in needs else 1) + 3 * 8 * widest.in_features**2
        if "inputs" in needs:
            # Rows of every group's input, three copies of the widest while it is solved.
            rows = min(samples * seq_len, 8192) * 4
            read = [x for x in in_blocks if x.name.removeprefix(block_path) in firsts]
            wide = sum(x.in_features for x in read)
            solver += rows * (wide + 3 * widest.in_features) + 4 * 8 * widest.in_features**2
        if "block" in needs:
            # Gradients, two Adam moments and the dense weight of every layer of a block.
            solver = max(by_block.values()) * 4 * 6 + 8 * seq_len * widest.in_features * 4 * 8
    outside = [checkpoint.nbytes(n) for n in checkpoint.names()]
    # The head in float32, before and after, with three tables of log probabilities of a sample.
    head_bytes = head.weights * (4 + 4) + 3 * seq_len * head.out_features * 4 if needs else 0
    at_the_end = max(head_bytes, max(outside))
    in_the_block = block + solver + forward + hessians
    return {
        "program": _PROGRAM_BYTES,
        "activations": activations,
        "block or head": int(max(in_the_block, at_the_end) * _ALLOCATOR),
    }


def _kv_cache_bytes(checkpoint: SourceCheckpoint, architecture: Architecture, context: int) -> int:
    """Keys and values of ``context`` tokens in 16 bit; 0 where attention's shape is unknown."""
    blocks = checkpoint.config.get("num_hidden_layers") or checkpoint.config.get("n_layer") or 0
    return 2 * 2 * blocks * architecture.kv_heads * architecture.head_dim * context


def _parameters(checkpoint: SourceCheckpoint) -> int:
    return sum(prod(checkpoint.shape(name)) for name in checkpoint.names())


def available_memory() -> tuple[int | None, str]:
    """Memory that this process can still get, and what sets the limit; None where unknown."""
    found: list[tuple[int, str]] = []
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        found.append((int(fields["MemAvailable"].split()[0]) * 1024, "available on this machine"))
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            found.append((total, "memory of this machine"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # versions 2 and 1
        try:
            limit = int(Path("/sys/fs/cgroup", name).read_text())
        except (OSError, ValueError):
            continue  # no such control group, or "max": no limit
        found.append((limit, "limit of the control group"))
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            found.append((soft, "ulimit -v"))
    except ImportError:  # not on Windows
        pass
    return min(found) if found else (None, "unknown on this system")


def parse_bytes(text: str | int) -> int:
    """``"24GB"`` (10^9), ``"24GiB"`` (2^30) or a plain number of bytes.

    Raises:
        SchemeError: it reads as none of these.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise SchemeError(f"a size looks like 24GB, 512MiB or 1.5T, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _existing_parent(path: Path) -> Path:
    path = path.absolute().parent
    while not path.exists():
        path = path.parent
    return path


def _in_words(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 10**9 else f"{count / 1e6:,.1f} MB"
