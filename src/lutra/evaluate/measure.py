"""`lutra eval`: one pass over the text with both models, then the tasks, as one JSON object."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CalibrationError, CheckpointError, SchemeError
from lutra.evaluate.divergence import divergence, quantile
from lutra.evaluate.load import (
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    open_checkpoint,
    serve,
)
from lutra.evaluate.perplexity import (
    JOINS,
    Windows,
    choose_seq_len,
    cut_windows,
    mean_and_error,
    positions_of,
    token_nll,
)
from lutra.evaluate.size import measure_size

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

# Logits of one batch stay below this where one window does; a batch has at most 8 windows.
_BATCH_BYTES = 1 << 28
_MAX_BATCH = 8


@dataclass(frozen=True)
class Comparison:
    """What one pass gives, per predicted token, on the CPU.

    Attributes:
        nll_WN: negative log-likelihood in nats, float32 ``[windows, seq_len - 1]``.
        reference_nll_WN: the same of the original; None without one.
        kl_WN: KL(original || model) in nats; None without an original.
        same_WN: bool, both rank the same token first; None without an original.
        seconds: time spent in the model that is measured.
    """

    nll_WN: Tensor
    reference_nll_WN: Tensor | None
    kl_WN: Tensor | None
    same_WN: Tensor | None
    seconds: float


@torch.inference_mode()
def compare(
    model: Any,
    windows: Windows,
    reference: Any = None,
    *,
    batch_size: int,
    progress: Progress | None = None,
    names: tuple[str, str] = ("the model", "the original"),
) -> Comparison:
    """Run a model, and the original beside it, over the same windows.

    At no time are more logits held than those of one batch, of both models.

    Args:
        model: a causal language model of transformers.
        windows: from :func:`lutra.evaluate.perplexity.cut_windows`.
        reference: the original model, or None.
        batch_size: windows per forward pass.
        progress: called after each batch.
        names: how errors call the two models.

    Raises:
        CheckpointError: logits are NaN or infinite, or the vocabularies differ.
    """  # fmt: skip
    nlls, reference_nlls, kls, same = [], [], [], []
    device = next(model.parameters()).device
    seconds = 0.0
    done = 0
    for batch_BL in windows.ids_WL.split(batch_size):
        ids_BL = batch_BL.to(device)
        begin = time.perf_counter()
        logits_BLV = model(ids_BL, use_cache=False).logits
        nll = _finite(token_nll(logits_BLV, ids_BL).cpu(), names[0], done)
        seconds += time.perf_counter() - begin
        nlls.append(nll)
        if reference is not None:
            expected_BLV = reference(ids_BL, use_cache=False).logits
            nll = _finite(token_nll(expected_BLV, ids_BL).cpu(), names[1], done)
            reference_nlls.append(nll)
            kl, agree = divergence(expected_BLV, logits_BLV)
            kls.append(kl.cpu())
            same.append(agree.cpu())
        done += len(batch_BL)
        if progress is not None:
            progress(done, len(windows.ids_WL))
    if reference is None:
        return Comparison(torch.cat(nlls), None, None, None, seconds)
    return Comparison(
        torch.cat(nlls), torch.cat(reference_nlls), torch.cat(kls), torch.cat(same), seconds
    )


def _finite(nll_BN: Tensor, name: str, first_window: int) -> Tensor:
    bad = ~nll_BN.isfinite().all(-1)
    if bad.any():
        window = first_window + int(bad.nonzero()[0])
        raise CheckpointError(
            f"{name} gives NaN or infinite logits in window {window} of the text. Its weights are "
            "damaged, or a 16-bit dtype overflows: try float32."
        )
    return nll_BN


def default_batch_size(seq_len: int, vocab_size: int) -> int:
    """Windows per forward pass; it depends on shapes only, so that figures are reproducible."""
    return max(1, min(_MAX_BATCH, _BATCH_BYTES // (4 * seq_len * vocab_size)))


def evaluate(
    model_dir: str | Path,
    *,
    text: str | Path | None = None,
    against: str | Path | None = None,
    bits: int | None = None,
    seq_len: int | None = None,
    max_windows: int | None = None,
    tasks: Sequence[str] | None = None,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch_size: int | None = None,
    join: str = "as-is",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, dense or quantized, and compare it with its original.

    The protocol is that of :mod:`lutra.evaluate.perplexity`; the divergence that of
    :mod:`lutra.evaluate.divergence`; both come from a single pass.

    Args:
        model_dir: the checkpoint's folder (or a hub id).
        text: a UTF-8 file to measure perplexity on; may be left out if tasks are given.
        against: the original checkpoint, for KL divergence and top-1 agreement.
        bits: measure this lower precision of a file that serves several; ``bits_per_weight`` is
            then that of the planes, scales and offsets in use.
        seq_len: tokens of a window; by default the smaller of 2048 and the model's positions.
        max_windows: stop after so many windows.
        tasks: names of task files, ``lambada`` or ``arc_easy`` (:mod:`lutra.evaluate.tasks`).
        tasks_dir: where the task files lie.
        limit: use only the first so many items of each task.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default see ``dtype_reason``.
        batch_size: windows (or task items) per forward pass.
        join: ``as-is`` or ``blank-lines``, how the lines of the text are joined.
        progress: called with windows done and windows in all.

    Returns:
        ``perplexity``, ``perplexity_reference``, ``kl_mean``, ``kl_p99`` (nats),
        ``top1_agreement`` (0 to 1), ``bits_per_weight``, ``tokens`` (predicted ones); what needs
        an original or a text that was not given is None. Further: ``log_perplexity_stderr``,
        ``log_perplexity_ratio`` (ln of perplexity over reference) with its standard error,
        ``kl_stderr``, ``kl_median``, ``kl_p90``, ``kl_max``, ``top1_stderr``, ``seq_len``,
        ``windows``, ``text_tokens``, ``text_sha256``, ``joined``, ``size_bytes``,
        ``bits_per_parameter``, ``parameters``, ``seconds``, ``tokens_per_second`` (of the forward
        pass), ``dtype``, ``dtype_reason``, ``device``, ``versions``, and ``tasks``.

    Raises:
        CheckpointError: a folder, its tokenizer or its weights can not be used, or the two models
            do not share a vocabulary.
        CalibrationError: the text or a task file can not be used, or is too short.
        SchemeError: an option that can not work.
        ResourceError: not enough memory, or lm-evaluation-harness is missing.
    """  # fmt: skip
    if text is None and not tasks:
        raise CalibrationError("nothing to measure: give a text, or tasks, or both")
    if text is None and against is not None:
        raise SchemeError("models are compared on a text: give --text together with --against")
    if batch_size is not None and batch_size < 1:
        raise SchemeError(f"--batch-size must be at least 1, not {batch_size}")
    started = time.perf_counter()
    checkpoint = open_checkpoint(model_dir)
    size = measure_size(checkpoint.path)
    torch_dtype, reason = choose_dtype(dtype, size.parameters, device)
    tokenizer = load_tokenizer(checkpoint)
    prepared = None
    if tasks:  # before the models are loaded: a missing file should be heard of at once
        from lutra.evaluate.tasks import load_tasks
        from lutra.integrations.lm_eval import require_lm_eval

        prepared = load_tasks(tasks, None if tasks_dir is None else Path(tasks_dir), limit)
        require_lm_eval()
    original = None
    if against is not None:
        original = open_checkpoint(against)
        _same_tokens(tokenizer, load_tokenizer(original), original.path)
    windows = None
    if text is not None:
        config = load_config(checkpoint)
        seq_len = choose_seq_len(seq_len, positions_of(config))
        vocab_size = config.get_text_config().vocab_size
        windows = cut_windows(Path(text), tokenizer, vocab_size, seq_len, max_windows, join)
        window_batch = batch_size or default_batch_size(seq_len, vocab_size)
    model = load_model(checkpoint, device, torch_dtype)
    served_bits = None if bits is None else serve(model, bits, checkpoint.path)
    if windows is not None:
        reference = None if original is None else load_model(original, device, torch_dtype)
        comparison = compare(
            model, windows, reference, batch_size=window_batch, progress=progress,
            names=(str(checkpoint.path), str(original.path if original else "the original")),
        )  # fmt: skip
        del reference
        result = summary(comparison, windows)
    else:
        result = dict.fromkeys(
            ("perplexity", "perplexity_reference", "kl_mean", "kl_p99", "top1_agreement")
        ) | {"tokens": 0}
    result |= {
        "bits_per_weight": size.bits_per_weight if served_bits is None else served_bits,
        "bits_per_parameter": size.bits_per_parameter,
        "size_bytes": size.size_bytes,
        "parameters": size.parameters,
        "model": checkpoint.path.resolve().name,
        "against": None if original is None else original.path.resolve().name,
    }
    if prepared is not None:
        from lutra.evaluate.tasks import run_tasks

        result["tasks"] = run_tasks(model, tokenizer, prepared, batch_size or 1)
    result |= {
        "device": device_name(device),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "dtype_reason": reason,
        "versions": versions(),
        "seconds": time.perf_counter() - started,
    }
    return result


def summary(comparison: Comparison, windows: Windows) -> dict[str, Any]:
    """The figures of one pass, under the names of ``lutra eval --json``."""
    log_ppl, log_ppl_error = mean_and_error(comparison.nll_WN.double().mean(-1))
    processed = windows.ids_WL.numel()
    result: dict[str, Any] = {
        "perplexity": _exp(log_ppl),
        "perplexity_reference": None,
        "kl_mean": None,
        "kl_p99": None,
        "top1_agreement": None,
        "tokens": windows.predictions,
        "log_perplexity_stderr": log_ppl_error,
        "seq_len": windows.seq_len,
        "windows": len(windows.ids_WL),
        "text_tokens": windows.text_tokens,
        "text_sha256": windows.text_sha256,
        "joined": JOINS[windows.join],
        "tokens_per_second": processed / comparison.seconds,
    }
    if comparison.kl_WN is None:
        return result
    assert comparison.reference_nll_WN is not None and comparison.same_WN is not None
    kl_WN = comparison.kl_WN.double()
    reference_W = comparison.reference_nll_WN.double().mean(-1)
    # Paired: both models read the same windows, so what is hard in the text cancels.
    ratio, ratio_error = mean_and_error(comparison.nll_WN.double().mean(-1) - reference_W)
    kl_mean, kl_error = mean_and_error(kl_WN.mean(-1))
    same, same_error = mean_and_error(comparison.same_WN.double().mean(-1))
    return result | {
        "perplexity_reference": _exp(float(reference_W.mean())),
        "log_perplexity_ratio": ratio,
        "log_perplexity_ratio_stderr": ratio_error,
        "kl_mean": kl_mean,
        "kl_stderr": kl_error,
        "kl_median": quantile(kl_WN, 0.5),
        "kl_p90": quantile(kl_WN, 0.9),
        "kl_p99": quantile(kl_WN, 0.99),
        "kl_max": float(kl_WN.max()),
        "top1_agreement": same,
        "top1_stderr": same_error,
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _same_tokens(tokenizer: Any, other: Any, folder: Path) -> None:
    if tokenizer.get_vocab() != other.get_vocab():
        raise CheckpointError(
            f"the tokenizer of {folder} differs from the quantized model's: they can not be "
            "compared token by token. Is --against the model that was quantized?"
        )


def device_name(device: str) -> str:
    """The device in words, for reports."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    from importlib.metadata import version

    import lutra

    found = {"lutra": lutra.__version__, "torch": str(torch.__version__)}
    found |= {package: version(package) for package in ("transformers", "safetensors")}
    return found | {"python": platform.python_version()}
