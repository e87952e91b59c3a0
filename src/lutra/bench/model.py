"""`lutra bench model`: prefill and decode speed of a whole model, beside the memory's own speed.

A token that is decoded reads every weight once, so on a machine whose memory is the limit,
``gbps`` (bytes of weights read per second of decoding) comes close to ``read_limit_gbps`` (a plain
streaming read on the same machine, measured in the same run). What is missing between the two is
attention, norms, sampling and overhead.

A shape by name (``llama-3-8b``) is built with random packed weights; its 16-bit weights never
exist, so it needs no more memory than the quantized model.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from lutra.errors import LutraError, ResourceError, SchemeError
from lutra.evaluate.load import choose_dtype, load_model, open_checkpoint
from lutra.evaluate.measure import device_name, versions
from lutra.evaluate.perplexity import positions_of
from lutra.evaluate.size import measure_size
from lutra.nn import QuantizedLinear
from lutra.scheme import Format

#: Shapes of well-known models, as arguments of transformers' ``LlamaConfig``.
SHAPES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
    }
    for name, hidden, mlp, layers, heads, kv_heads, vocabulary, tied, positions in (
        ("tinyllama-1.1b", 2048, 5632, 22, 32, 4, 32000, False, 2048),
        ("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256, True, 131072),
        ("llama-3.2-3b", 3072, 8192, 28, 24, 8, 128256, True, 131072),
        ("llama-2-7b", 4096, 11008, 32, 32, 32, 32000, False, 4096),
        ("mistral-7b", 4096, 14336, 32, 32, 8, 32768, False, 32768),
        ("llama-3-8b", 4096, 14336, 32, 32, 8, 128256, False, 8192),
        ("llama-2-13b", 5120, 13824, 40, 40, 40, 32000, False, 4096),
        ("llama-3-70b", 8192, 28672, 80, 64, 8, 128256, False, 8192),
    )
}


def bench_model(
    path_or_shape: str | Path,
    *,
    bits: int = 4,
    group_size: int = 128,
    kind: str = "bcq",
    device: str = "cpu",
    dtype: str | None = None,
    prompt_len: int = 64,
    new_tokens: int = 32,
    layers: int | None = None,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure one model at batch size 1.

    Args:
        path_or_shape: a checkpoint's folder, dense or quantized, or a name of :data:`SHAPES`.
        bits: of a named shape; 16 is dense. A folder has its own.
        group_size, kind: storage format of a named shape (``bcq``, ``ubcq``, ``int``).
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of activations and of what is not quantized; by default as ``lutra eval`` chooses.
        prompt_len: tokens of the prompt.
        new_tokens: tokens decoded after it, one by one, greedily.
        layers: keep only the first so many blocks (of shapes and folders), to fit or to be quick.
        repeats: runs after one that warms up; medians are reported.
        seed: of random weights and prompt.

    Returns:
        ``ms_per_token`` (decoding, median over all tokens) and ``ms_per_token_stdev`` (of the runs'
        medians), ``ttft_ms`` (prompt to first token), ``tokens_per_second``,
        ``prompt_tokens_per_second``, ``memory_gb`` (the process's peak while generating; of a GPU,
        its allocator's peak), ``gbps``, ``read_limit_gbps``, ``weight_bytes_per_token``,
        ``kernels`` (layers by kernel), and what was run: ``model``, ``format``, ``layers`` (used
        and in all), ``dtype``, ``prompt_len``, ``new_tokens``, ``repeats``, ``threads``,
        ``device``, ``versions``.

    Raises:
        SchemeError: an unknown shape, or an option that can not work.
        CheckpointError: the folder can not be used.
        ResourceError: the model does not fit into memory.
    """
    for name, value in (
        ("prompt_len", prompt_len), ("new_tokens", new_tokens), ("repeats", repeats),
        ("layers", 1 if layers is None else layers),
    ):  # fmt: skip
        if value < 1:
            raise SchemeError(f"{name} must be at least 1, not {value}")
    torch.manual_seed(seed)
    try:
        if str(path_or_shape) in SHAPES and not Path(path_or_shape).exists():
            name = str(path_or_shape)
            format = None if bits == 16 else Format(kind, bits, group_size)
            model, all_layers = _random_model(name, format, device, dtype, layers)
            shown = "dense" if format is None else str(format)
        else:
            model, all_layers = _load(path_or_shape, device, dtype, layers)
            name = Path(path_or_shape).resolve().name
            formats = {str(m.format) for m in model.modules() if isinstance(m, QuantizedLinear)}
            shown = ", ".join(sorted(formats)) or "dense"
        positions = positions_of(model.config)
        if positions is not None and prompt_len + new_tokens > positions:
            raise SchemeError(
                f"a prompt of {prompt_len:,} and {new_tokens:,} new tokens pass the model's "
                f"{positions:,} positions"
            )
        read_bytes = weight_bytes_per_token(model)
        limit = read_limit_gbps(device)
        runs, peak = _time_runs(model, prompt_len, new_tokens, repeats, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{path_or_shape} does not fit into the memory of {device} ({error}). "
            "Cut its depth with --layers, or use fewer bits."
        ) from error
    kernels: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.choice is not None:
            kernel = module.choice.kernel.name
            kernels[kernel] = kernels.get(kernel, 0) + 1
    embedding: Tensor = model.get_input_embeddings().weight
    del model
    first_token = median(run[0] for run in runs)
    medians = [median(run[1:]) for run in runs if len(run) > 1]
    per_token = median(second for run in runs for second in (run[1:] or run))
    return {
        "ms_per_token": 1000 * per_token,
        "ms_per_token_stdev": 1000 * stdev(medians) if len(medians) > 1 else None,
        "ttft_ms": 1000 * first_token,
        "tokens_per_second": 1 / per_token,
        "prompt_tokens_per_second": prompt_len / first_token,
        "memory_gb": peak / 1e9,
        "gbps": read_bytes / per_token / 1e9,
        "read_limit_gbps": max(limit, read_limit_gbps(device)),  # other work may have disturbed one
        "weight_bytes_per_token": read_bytes,
        "kernels": kernels,
        "model": name,
        "format": shown,
        "layers": [layers if layers is not None else all_layers, all_layers],
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "versions": versions(),
    }


def weight_bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that decoding one token reads: all but tables of which it reads one row.

    Call it before the model has run: kernels may then hold the packed weights in their own layout.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and getattr(head, "weight", None) is not None:
        tables.discard(id(head.weight))  # a tied table is also the head, which is read whole
    read = {id(p): p for p in model.parameters() if id(p) not in tables}
    return sum(p.numel() * p.element_size() for p in read.values())


def read_limit_gbps(device: str, size: int = 1 << 28, repeats: int = 5) -> float:
    """Streaming read of ``size`` bytes, far more than any cache: the best of some runs, in GB/s."""
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
    model: Any, prompt_len: int, new_tokens: int, repeats: int, device: str
) -> tuple[list[list[float]], int]:
    """Seconds of each token of each run, the first with the prompt; and peak memory in bytes."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(0, vocabulary, (1, prompt_len), device=device)
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
    blocks = _blocks(model)
    total = len(blocks)
    if layers is not None:
        _check_layers(layers, total)
        del blocks[layers:]
        model.config.get_text_config().num_hidden_layers = layers
    return model, total


def _check_layers(layers: int, total: int) -> None:
    if layers > total:
        raise SchemeError(f"--layers {layers}: the model has only {total} blocks")


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks: the longest list of modules."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise LutraError("the model has no list of decoder blocks to count")
    return max(lists, key=len)


def _random_model(
    shape: str, format: Format | None, device: str, dtype: str | None, layers: int | None
) -> tuple[Any, int]:
    """A Llama of a named shape with random weights, packed ones built as such."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(SHAPES[shape])
    total = settings["num_hidden_layers"]
    if layers is not None:
        _check_layers(layers, total)
        settings["num_hidden_layers"] = layers
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
        blocks = model.model.layers
        # The dtype is that of the whole model, however many blocks are kept.
        left_out = (total - len(blocks)) * sum(p.numel() for p in blocks[0].parameters())
        parameters = left_out + sum(p.numel() for p in model.parameters())
        chosen, _ = choose_dtype(dtype, parameters, device)
        model.to(torch.bfloat16 if isinstance(chosen, str) else chosen)
        for block in blocks:
            for name, module in list(block.named_modules()):
                if isinstance(module, nn.Linear) and format is not None:
                    packed = QuantizedLinear(module.in_features, module.out_features, format)
                    block.set_submodule(name, packed)
    model.to_empty(device=device)
    model.tie_weights()
    # Not a parameter, so it has no values after to_empty: computed anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, config.hidden_size)
    return model.eval(), total


def _fill(name: str, parameter: Tensor, width: int) -> None:
    """Random values that keep activations of order 1 through any depth."""
    if parameter.dtype == torch.int32:
        parameter.random_(-(2**31), 2**31 - 1)
    elif parameter.dtype == torch.uint8:
        parameter.random_(0, 2)
    elif name.endswith("weight_scale"):
        parameter.fill_(width**-0.5)
    elif name.endswith("weight_offset"):
        parameter.zero_()
    elif parameter.ndim == 1:
        parameter.fill_(1)
    else:
        parameter.normal_(0, width**-0.5)
