"""Calibration text: tokenised whole, cut into windows, a seeded choice of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CalibrationError, SchemeError
from lutra.evaluate.perplexity import read_text, tokenize


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids and where they come from.

    Attributes:
        ids_NT: int64 ``[samples, seq_len]``.
        facts: file name, SHA-256, samples, seq_len and seed, for the output's record.
    """

    ids_NT: Tensor
    facts: dict[str, Any]


def calibration_windows(
    tokenizer: Any, path: str | Path, samples: int, seq_len: int, seed: int
) -> Calibration:
    """``samples`` different windows of ``seq_len`` tokens, chosen by ``seed``, in text order.

    Windows do not overlap. A text with fewer windows than asked gives all that it has.

    Raises:
        CalibrationError: the text is missing, unreadable, or shorter than one window.
        SchemeError: no samples, or windows too short to predict anything.
    """
    if samples < 1 or seq_len < 2:
        raise SchemeError(f"--samples must be at least 1 and --seq-len 2, not {samples}, {seq_len}")
    text, digest = read_text(Path(path))
    ids = tokenize(tokenizer, text)
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
