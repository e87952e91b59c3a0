"""Calibration text: tokenised whole, cut into windows, a seeded choice of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CalibrationError, CheckpointError


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids and where they come from.

    Attributes:
        ids_NT: int64 ``[samples, seq_len]``.
        facts: file name, SHA-256, samples, seq_len and seed, for the output's record.
    """

    ids_NT: Tensor
    facts: dict[str, Any]


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, from local files alone.

    Raises:
        CheckpointError: there is none, or it can not be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds for a missing or damaged tokenizer
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load ({error}). Copy tokenizer.json "
            "and tokenizer_config.json of the model beside its weights."
        ) from error


def read_text(path: str | Path) -> tuple[str, str]:
    """A text file and the SHA-256 of its bytes.

    Raises:
        CalibrationError: no such file, not UTF-8, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"calibration text {path} does not exist or is not a file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"calibration text {path} is not UTF-8 (byte {error.start}). Convert it first, for "
            f"example: iconv -f latin1 -t utf-8 {path}"
        ) from error
    if not text.strip():
        raise CalibrationError(f"calibration text {path} is empty")
    return text, hashlib.sha256(content).hexdigest()


def calibration_windows(
    tokenizer: Any, path: str | Path, samples: int, seq_len: int, seed: int
) -> Calibration:
    """``samples`` different windows of ``seq_len`` tokens, chosen by ``seed``, in text order.

    Windows do not overlap. A text with fewer windows than asked gives all that it has.

    Raises:
        CalibrationError: the text is missing, unreadable, or shorter than one window.
    """
    text, digest = read_text(path)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    windows = len(ids) // seq_len
    if windows == 0:
        raise CalibrationError(
            f"calibration text {path} has {len(ids)} tokens, less than one window of {seq_len}. "
            "Use more text, or shorter windows (--seq-len)."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(windows, generator=generator)[:samples].sort().values
    ids_NT = ids[: windows * seq_len].view(windows, seq_len)[chosen]
    facts = {
        "file": Path(path).name, "sha256": digest, "samples": len(chosen), "seq_len": seq_len,
        "seed": seed,
    }  # fmt: skip
    return Calibration(ids_NT, facts)
