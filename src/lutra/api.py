"""The verbs as Python functions, with the names that they have on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lutra.evaluate import evaluate
from lutra.generate import generate
from lutra.runner.walk import Progress, Recipe, quantize_checkpoint

__all__ = ["evaluate", "generate", "load", "quantize"]


def quantize(
    src: str | Path,
    dst: str | Path,
    *,
    method: str = "lut-gemm",
    bits: int = 4,
    group_size: int = 128,
    kind: str = "",
    calibration: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 1024,
    serve_bits: Sequence[int] = (),
    lm_head_bits: int = 0,
    device: str = "cpu",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Quantize a Hugging Face checkpoint into a new folder. Repeat the call to resume it.

    Args:
        src: folder or hub id.
        dst: folder to write; must not exist.
        method: one of :func:`lutra.methods.methods`.
        bits: width of the weights, 1 to 8.
        group_size: inputs per group, a multiple of 32; -1 for one group per row.
        kind: storage format: ``ubcq``, ``bcq`` or ``int``; empty for the method's default.
        calibration: UTF-8 text file.
        samples, seq_len: windows of calibration text and their length in tokens.
        serve_bits: lower precisions that the file shall serve too.
        lm_head_bits: width of the head; 0 leaves it as it is.
        device: where to compute, ``cpu`` or ``cuda``.
        seed: for the choice of windows and the order of training.
        options: the method's own options.
        on_progress: called before each step.

    Returns:
        The content of ``lutra_report.json`` in ``dst``.

    Raises:
        LutraError: what is wrong, with which file, tensor or option, and the way out.
    """
    recipe = Recipe(
        method, bits, group_size, kind, tuple(serve_bits), lm_head_bits,
        None if calibration is None else Path(calibration), samples, seq_len, seed,
        dict(options or {}),
    )  # fmt: skip
    return quantize_checkpoint(src, dst, recipe, device, on_progress)


def load(
    folder: str | Path,
    *,
    bits: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    tensor_parallel: bool = False,
) -> tuple[Any, Any]:
    """A checkpoint as a transformers model, ready to generate, and its tokenizer.

    Args:
        folder: dense or quantized checkpoint.
        bits: serve this many bits of a file that was made with ``serve_bits``.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default float32 on a CPU for small
            models, else the checkpoint's own.
        tensor_parallel: cut the model over the processes that torchrun has started; each gets its
            part, and all call it together.

    Raises:
        CheckpointError: the folder is damaged or not a checkpoint.
        SchemeError: the file does not serve ``bits``, or the model can not be cut over so many
            processes.
        ResourceError: it does not fit, or there are no processes to cut it over.
    """
    from lutra.evaluate.load import choose_dtype, load_model, load_tokenizer, open_checkpoint, serve
    from lutra.evaluate.size import measure_size

    checkpoint = open_checkpoint(folder)
    torch_dtype, _ = choose_dtype(dtype, measure_size(checkpoint.path).parameters, device)
    if tensor_parallel:
        from lutra.integrations.tensor_parallel import load_parallel, start

        start()
        model = load_parallel(checkpoint.path, device, torch_dtype)
    else:
        model = load_model(checkpoint, device, torch_dtype)
    if bits is not None:
        serve(model, bits, folder)
    return model, load_tokenizer(checkpoint)
