"""`lutra bench model`: prefill and decode speed of a whole model, beside the memory's own speed.

A token that is decoded reads every weight once, so on a machine whose memory is the limit,
``gbps`` (bytes of weights read per second of decoding) comes close to ``read_limit_gbps`` (a plain
streaming read on the same machine, measured in the same run). What is missing between the two is
attention, norms, sampling and overhead; ``profile`` says how much of each.

A shape by name (``llama-3-8b``) is built with random packed weights; its 16-bit weights never
exist, so it needs no more memory than the quantized model.

On a GPU the time of a token is that of ``model.generate``, which replays a recorded graph; on a CPU
that of the model's forward pass with transformers' own cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lutra.bench.profile import profile_cpu, profile_gpu
from lutra.bench.shapes import SHAPES, blocks_of, check_layers
from lutra.bench.shapes import fill as _fill
from lutra.bench.shapes import random_model as _random_model
from lutra.errors import ResourceError, SchemeError
from lutra.evaluate.load import choose_dtype, load_model, open_checkpoint
from lutra.evaluate.measure import device_name, versions
from lutra.evaluate.perplexity import positions_of
from lutra.evaluate.size import measure_size
from lutra.integrations.tensor_parallel import Sum, start
from lutra.packed import packed_layers
from lutra.runtime.generation import enable, why_not_recorded
from lutra.runtime.step import DecodeStep, capacity_for
from lutra.scheme import Format

__all__ = ["SHAPES", "_fill", "_random_model", "bench_model", "read_limit_gbps"]


def bench_model(
    path_or_shape: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    kind: str = "bcq",
    head_bits: int = 16,
    device: str = "cpu",
    dtype: str | None = None,
    prompt_len: int | Sequence[int] = 64,
    new_tokens: int = 32,
    batch: int | Sequence[int] = 1,
    layers: int | None = None,
    repeats: int = 3,
    threads: int | None = None,
    profile: bool = False,
    tensor_parallel: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure one model, for every length of the prompt and batch size asked for.

    Args:
        path_or_shape: a checkpoint's folder, dense or quantized, or a name of :data:`SHAPES`.
        bits: of a named shape; 16 is dense. A folder has its own.
        group_size, kind: storage format of a named shape (``bcq``, ``ubcq``, ``int``); -1 is one
            group per row.
        head_bits: of a named shape's head; 16 is dense, as `lutra quantize` leaves it.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of activations and of what is not quantized; by default as ``lutra eval`` chooses.
        prompt_len: tokens of the prompt, which is the context that is attended to.
        new_tokens: tokens decoded after it, one by one, greedily.
        batch: sequences decoded together.
        layers: keep only the first so many blocks (of shapes and folders), to fit or to be quick.
        repeats: runs after those that warm up, one on a CPU and two on a GPU; medians are reported.
        threads: of the CPU; by default torch's.
        profile: also say where the time of a token goes.
        tensor_parallel: cut the model over the processes that torchrun has started; ``memory_gb``,
            ``gbps`` and ``weight_bytes_per_token`` are those of one of them.
        seed: of random weights and prompt.

    Returns:
        ``ms_per_token`` (of a step of all sequences; median over tokens, on a GPU over the
        means of runs) and
        ``ms_per_token_stdev`` (over runs), ``ms_per_token_range`` (the fastest token, the median
        and the slowest), ``ttft_ms`` (prompt to first token; on a GPU that of a prompt whose
        length has come before),
        ``tokens_per_second`` (of all sequences), ``prompt_tokens_per_second``, ``memory_gb`` (the
        process's peak while generating; of a GPU, its allocator's peak), ``gbps``,
        ``read_limit_gbps``, ``weight_bytes_per_token``, ``kernels`` (layers by kernel), and what
        was run: ``model``, ``format``, ``layers`` (used and in all), ``dtype``, ``prompt_len``,
        ``new_tokens``, ``batch``, ``repeats``, ``threads``, ``ranks``, ``device``, ``versions``.
        Where several lengths or batches were asked for, these are of the first, and ``rows`` has
        all. With ``profile``, ``profile`` has what :mod:`lutra.bench.profile` returns.

    Raises:
        SchemeError: an unknown shape, or an option that can not work.
        CheckpointError: the folder can not be used.
        ResourceError: the model does not fit into memory.
    """
    prompts = [prompt_len] if isinstance(prompt_len, int) else list(prompt_len)
    batches = [batch] if isinstance(batch, int) else list(batch)
    for name, values in (
        ("prompt_len", prompts), ("batch", batches), ("new_tokens", [new_tokens]),
        ("repeats", [repeats]), ("layers", [1 if layers is None else layers]),
        ("threads", [1 if threads is None else threads]),
    ):  # fmt: skip
        if not values or min(values) < 1:
            raise SchemeError(f"{name} must be at least 1, not {min(values, default=None)}")
    if threads is not None:
        torch.set_num_threads(threads)
    total = None
    if tensor_parallel:
        start()
        total = Sum()
        if torch.device(device).type == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
    torch.manual_seed(seed)
    try:
        model, name, shown, all_layers = _model(
            path_or_shape, bits, group_size, kind, head_bits, device, dtype, layers, total
        )
        positions = positions_of(model.config)
        longest = max(prompts) + new_tokens
        if positions is not None and longest > positions:
            raise SchemeError(
                f"a prompt of {max(prompts):,} and {new_tokens:,} new tokens pass the model's "
                f"{positions:,} positions"
            )
        read_bytes = weight_bytes_per_token(model)
        limit = read_limit_gbps(device)
        embedding: Tensor = model.get_input_embeddings().weight
        for layer in packed_layers(model):
            layer.prepare_if_local(embedding.dtype)
        if total is not None:
            total.use_direct(embedding.device, 64 * model.config.hidden_size)
        rows = []
        for length in prompts:
            for sequences in batches:
                measured = _measure(model, length, new_tokens, sequences, repeats, device)
                per_token = measured["ms_per_token"] / 1000
                measured["gbps"] = read_bytes / per_token / 1e9
                rows.append({"prompt_len": length, "batch": sequences} | measured)
        profiled = _profile(model, prompts[0], batches[0], device) if profile else None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{path_or_shape} does not fit into the memory of {device} ({error}). "
            "Cut its depth with --layers, or use fewer bits."
        ) from error
    kernels: dict[str, int] = {}
    for layer in packed_layers(model):
        if layer.choice is not None:
            kernel = layer.choice.kernel.name
            kernels[kernel] = kernels.get(kernel, 0) + 1
    used = len(blocks_of(model))
    del model
    if torch.device(device).type == "cpu":  # other work may have disturbed the first
        limit = max(limit, read_limit_gbps(device))
    result = {
        **{k: v for k, v in rows[0].items() if k not in ("prompt_len", "batch")},
        "read_limit_gbps": limit,
        "weight_bytes_per_token": read_bytes,
        "kernels": kernels,
        "model": name,
        "format": shown,
        "layers": [used, all_layers],
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "prompt_len": prompts[0],
        "new_tokens": new_tokens,
        "batch": batches[0],
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "ranks": torch.distributed.get_world_size(total.group) if total is not None else 1,
        "device": device_name(device),
        "versions": versions(),
    }
    if len(rows) > 1:
        result["rows"] = rows
    if profiled is not None:
        result["profile"] = profiled
    return result


def _model(
    path_or_shape: str | Path, bits: int, group_size: int, kind: str, head_bits: int, device: str,
    dtype: str | None, layers: int | None, total: Sum | None,
) -> tuple[Any, str, str, int]:  # fmt: skip
    """The model, its name, its formats for people, and how many blocks the whole has."""
    if str(path_or_shape) in SHAPES and not Path(path_or_shape).exists():
        name = str(path_or_shape)
        format = None if bits == 16 else Format(kind, bits, group_size)
        head = None if head_bits == 16 else Format(kind, head_bits, group_size)
        model, all_layers = _random_model(name, format, device, dtype, layers, head, total)
        shown = "dense" if format is None else str(format)
        if head is not None:
            shown += f", head {head}"
        return enable(model), name, shown, all_layers
    if total is not None:
        raise SchemeError(f"--tensor-parallel measures shapes: {', '.join(SHAPES)}")
    model, all_layers = _load(path_or_shape, device, dtype, layers)
    formats = {str(layer.format) for layer in packed_layers(model)}
    shown = ", ".join(sorted(formats)) or "dense"
    return enable(model), Path(path_or_shape).resolve().name, shown, all_layers


def _measure(
    model: Any, prompt_len: int, new_tokens: int, batch: int, repeats: int, device: str
) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    time_runs = _time_generate if on_gpu else _time_runs
    runs, peak = time_runs(model, prompt_len, new_tokens, batch, repeats, device)
    first_token = median(run[0] for run in runs)
    typical = fmean if on_gpu else median  # tokens come from a queue, or one by one
    of_runs = [typical(run[1:]) for run in runs if len(run) > 1]
    tokens = [seconds for run in runs for seconds in (run[1:] or run)]
    per_token = median(of_runs if on_gpu and of_runs else tokens)
    return {
        "ms_per_token": 1000 * per_token,
        "ms_per_token_stdev": 1000 * stdev(of_runs) if len(of_runs) > 1 else None,
        "ms_per_token_range": [1000 * min(tokens), 1000 * median(tokens), 1000 * max(tokens)],
        "ttft_ms": 1000 * first_token,
        "tokens_per_second": batch / per_token,
        "prompt_tokens_per_second": batch * prompt_len / first_token,
        "memory_gb": peak / 1e9,
    }


def _profile(model: Any, prompt_len: int, batch: int, device: str) -> dict[str, Any]:
    """Where the time of a token behind a prompt goes."""
    place = torch.device(device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (batch, prompt_len), device=device)
    with torch.no_grad():
        if place.type == "cuda" and why_not_recorded(model, prompt_len + 8) is None:
            step = DecodeStep(model, batch, capacity_for(prompt_len + 8))
            step.prefill(ids)
            step.advance()
            found = profile_gpu(step.advance, place)
            return found | {"fused_blocks": step.fallback is None, "recorded": True}
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def token() -> None:
            model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)

        found = profile_gpu(token, place) if place.type == "cuda" else profile_cpu(model, token)
        return found | {"fused_blocks": False, "recorded": False}


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _time_generate(
    model: Any, prompt_len: int, new_tokens: int, batch: int, repeats: int, device: str
) -> tuple[list[list[float]], int]:
    """As :func:`_time_runs`, through ``model.generate``: when its streamer gets the tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocabulary, (batch, prompt_len), device=device)
    mask = torch.ones_like(prompt)
    runs = []
    for run in range(repeats + 2):
        if run == 2:
            _reset_peak(device)
        clock = _Clock()
        begin = _now(device)
        model.generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens + 1, do_sample=False,
            streamer=clock, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        times = clock.times[1:]  # the prompt itself comes before the first
        if run > 1:  # the first builds what kernels need and records the step, the next the prompt
            each = [after - before for before, after in pairwise(times)]
            runs.append([times[0] - begin, *each])
    return runs, _peak(device)


def weight_bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: all but tables of which it reads one row.

    A packed weight counts in the form in which it is held, stored or as its kernel has laid it out.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and getattr(head, "weight", None) is not None:
        tables.discard(id(head.weight))  # a tied table is also the head, which is read whole
    held: list[Tensor] = [p for p in model.parameters() if id(p) not in tables]
    for layer in packed_layers(model):
        if layer.gave_up_weight:
            held += layer.prepared_tensors()
    # A group of siblings shares its tensors, and a kernel may take a parameter as it is.
    read = {t.data_ptr() or id(t): t for t in held}
    return sum(p.numel() * p.element_size() for p in read.values())


def read_limit_gbps(device: str, size: int = 1 << 28, repeats: int = 5) -> float:
    """Streaming read of ``size`` bytes, far more than any cache: the best of some runs, in GB/s.

    A GPU reads 4 GiB, or what is free, so that the launch does not count.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        free, _ = torch.cuda.mem_get_info(device)
        size = min(1 << 32, max(1 << 28, free // 4 // 1024 * 1024))
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    buffer.sum()
    best = float("inf")
    for _ in range(repeats):
        begin = _now(device)
        buffer.sum()
        best = min(best, _now(device) - begin)
    return size / best / 1e9


@torch.inference_mode()
def _time_runs(
    model: Any, prompt_len: int, new_tokens: int, batch: int, repeats: int, device: str
) -> tuple[list[list[float]], int]:
    """Seconds of each token of each run, the first with the prompt; and peak memory in bytes."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocabulary, (batch, prompt_len), device=device)
    runs = []
    for run in range(repeats + 1):
        if run == 1:
            _reset_peak(device)
        seconds = []
        ids, cache = prompt, None
        for _ in range(new_tokens + 1):
            begin = _now(device)
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1:].argmax(-1)
            seconds.append(_now(device) - begin)
            cache = output.past_key_values
        if run:  # the first run builds what kernels need, and warms the caches
            runs.append(seconds)
    return runs, _peak(device)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux: writing 5 starts VmHWM anew; elsewhere the peak includes loading
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _load(path: str | Path, device: str, dtype: str | None, layers: int | None) -> tuple[Any, int]:
    known = ", ".join(SHAPES)
    if not Path(path).exists() and "/" not in str(path):
        raise SchemeError(f"{path} is neither a folder nor a shape; shapes are {known}")
    checkpoint = open_checkpoint(path)
    torch_dtype, _ = choose_dtype(dtype, measure_size(checkpoint.path).parameters, device)
    model = load_model(checkpoint, device, torch_dtype)
    blocks = blocks_of(model)
    total = len(blocks)
    if layers is not None:
        check_layers(layers, total)
        del blocks[layers:]
        model.config.get_text_config().num_hidden_layers = layers
    return model, total
