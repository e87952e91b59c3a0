"""Load a model and its tokenizer for measuring, with errors that say what is wrong."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lutra.errors import CheckpointError, ResourceError, SchemeError
from lutra.evaluate.size import is_quantized
from lutra.formats.checkpoint import SourceCheckpoint, read_quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Up to here a model runs on the CPU in float32: exact, and no slower than 16 bit there.
FLOAT32_PARAMETERS = 1_500_000_000


def open_checkpoint(folder: str | Path) -> SourceCheckpoint:
    """Open a checkpoint, dense or ours; everything that needs no weights is checked.

    Raises:
        CheckpointError: the folder is no sound checkpoint, or is of a newer format version.
    """
    checkpoint = SourceCheckpoint.open(folder, quantized=True)
    if is_quantized(checkpoint.config):
        read_quantization_config(checkpoint.config)
    return checkpoint


def check_device(device: str) -> None:
    """Refuse a device that does not exist before anything is loaded.

    Raises:
        SchemeError: not the name of a device.
        ResourceError: this machine, or this build of torch, has no such device.
    """
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise SchemeError(f"{device!r} is no device; devices are cpu, cuda, cuda:1") from error
    if kind.type not in ("cpu", "cuda"):
        raise SchemeError(f"lutra computes on cpu and cuda, not on {device!r}")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ResourceError(
            f"there is no device {device}: torch {torch.__version__} sees {count} CUDA "
            f"device{'' if count == 1 else 's'}. Use --device cpu, or a build of torch for CUDA."
        )


def choose_dtype(asked: str | None, parameters: int, device: str) -> tuple[torch.dtype | str, str]:
    """The dtype of activations and of weights that are not quantized, and the reason for it.

    The choice depends on the model and the kind of device alone, so that it is the same on every
    machine. ``"auto"`` in the answer means the dtype in which the checkpoint was saved.

    Raises:
        SchemeError: an unknown dtype or device was asked for.
        ResourceError: there is no such device here.
    """
    check_device(device)
    if asked is not None:
        if asked not in DTYPES:
            raise SchemeError(f"unknown dtype {asked!r}; there are {', '.join(DTYPES)}")
        return DTYPES[asked], "asked for"
    if torch.device(device).type != "cpu":
        return "auto", "the checkpoint's own, as on every GPU"
    if parameters <= FLOAT32_PARAMETERS:
        return torch.float32, f"float32 on a CPU up to {FLOAT32_PARAMETERS:,} parameters"
    return "auto", f"the checkpoint's own above {FLOAT32_PARAMETERS:,} parameters"


def load_config(checkpoint: SourceCheckpoint) -> Any:
    """The model's configuration, through transformers.

    Raises:
        CheckpointError: transformers does not know this kind of model, or the file is damaged.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} can not be used: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_model(
    checkpoint: SourceCheckpoint, device: str = "cpu", dtype: torch.dtype | str = "auto"
) -> Any:
    """The model, through transformers, ready for inference.

    Raises:
        CheckpointError: transformers can not build it or the weights do not fit it.
        ResourceError: not enough memory on the device.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from lutra.runtime.generation import enable
    from lutra.runtime.loading import move, prepare_later, reading_ahead

    place = torch.device(device)
    on_gpu = place.type == "cuda"
    if on_gpu and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    logging.disable_progress_bar()
    try:
        with reading_ahead(checkpoint.path) as ahead:
            with prepare_later() if on_gpu else nullcontext():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    checkpoint.path, dtype=dtype, local_files_only=True
                )
            if on_gpu:
                return enable(move(model, place, ahead)).eval()
        return model.to(place).eval()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"{checkpoint.path} does not fit into the memory of {device} ({error}). "
            "Use a 16-bit dtype, another device, or a smaller model."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path} can not be loaded: {_first_line(error)}"
        ) from error
    finally:
        logging.enable_progress_bar()


def serve(model: Any, bits: int, folder: str | Path) -> float:
    """Let a loaded model multiply with the first ``bits`` planes of its layers only.

    Layers that do not offer ``bits`` (a head with a width of its own) stay as they are.

    Returns:
        Bits per weight of what is read then: those planes, and the scales and offsets for them.

    Raises:
        SchemeError: the checkpoint does not serve ``bits``.
    """
    from lutra.packed import packed_layers

    layers = list(packed_layers(model))
    offers = {layer: layer.widths for layer in layers}
    if not any(bits in offered for offered in offers.values()):
        there = sorted({b for offered in offers.values() for b in offered})
        raise SchemeError(
            f"{folder} can not serve {bits} bits: it was quantized for "
            f"{', '.join(map(str, there)) or 'none'}. Quantize with --serve-bits to serve more."
        )
    stored_bits, weights = 0.0, 0
    for layer in layers:
        if bits in offers[layer]:
            layer.serve(bits)
        count = layer.in_features * layer.out_features
        stored_bits += layer.read_bits_per_weight() * count
        weights += count
    return stored_bits / weights


def load_tokenizer(checkpoint: SourceCheckpoint) -> Any:
    """The folder's tokenizer.

    Raises:
        CheckpointError: it has none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions here
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer that can be read ({_first_line(error)}). "
            "Copy tokenizer.json and tokenizer_config.json of the original model into it."
        ) from error
    if len(tokenizer) == 0:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} knows no tokens: its files are missing. "
            "Copy tokenizer.json and tokenizer_config.json of the original model into the folder."
        )
    return tokenizer
