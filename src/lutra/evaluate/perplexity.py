"""Perplexity as the literature measures it: one text, non-overlapping windows, mean over tokens.

    ppl = exp( 1/M * sum_w sum_{t=2..L} -log p(x_wt | x_w1 .. x_w,t-1) ),   M = windows * (L - 1)

The whole text is tokenized at once, without special tokens, and cut into windows of L tokens; each
window is scored on its own, so its first token has no context and is not predicted. What is left
over at the end, less than one window, is dropped. This is the protocol of GPTQ (arXiv 2210.17323)
and of the work that compares with it. That work joins the rows of WikiText-2 by blank lines
(``join="blank-lines"``); by default the text is taken as it stands in the file, but for line ends,
which become ``\\n``.

Figures compare only where text, joining, tokenizer and window length are the same.

Shape suffixes: W windows, B windows of a batch, L tokens of a window, V vocabulary, N predictions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lutra.errors import CalibrationError, CheckpointError, SchemeError

#: How the lines of the text become one string, and what is said of it in reports.
JOINS = {
    "as-is": "the file as it stands",
    "blank-lines": "lines joined by blank lines",
}
DEFAULT_SEQ_LEN = 2048
# float32 copies of a slice of the logits stay below this, whatever the vocabulary.
_SLICE_BYTES = 1 << 26


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of token ids.

    Attributes:
        ids_WL: int64 token ids ``[windows, seq_len]``.
        text_tokens: tokens of the whole text, before what does not fill a window is dropped.
        text_sha256: hash of the file's bytes.
        join: key of :data:`JOINS`.
    """

    ids_WL: Tensor
    text_tokens: int
    text_sha256: str
    join: str

    @property
    def seq_len(self) -> int:
        return self.ids_WL.shape[1]

    @property
    def predictions(self) -> int:
        """Number of predicted tokens: all but the first of each window."""
        return self.ids_WL.shape[0] * (self.seq_len - 1)


def read_text(path: Path, join: str = "as-is") -> tuple[str, str]:
    """Read an evaluation text.

    Args:
        path: a UTF-8 file.
        join: ``as-is``, or ``blank-lines`` to join the file's lines by blank lines, as the
            literature does with the rows of WikiText-2.

    Returns:
        The text and the SHA-256 of the file's bytes.

    Raises:
        CalibrationError: the file is missing, empty or not UTF-8.
        SchemeError: no such way of joining.
    """
    if join not in JOINS:
        raise SchemeError(f"unknown join {join!r}; there are {', '.join(JOINS)}")
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise CalibrationError(f"the text {path} can not be read: {reason}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"the text {path} is not UTF-8: byte 0x{content[error.start]:02x} at position "
            f"{error.start:,}. Convert it first, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    if not text.strip():
        raise CalibrationError(f"the text {path} is empty. Give a file with text to measure on.")
    # As Python reads any text file: WikiText-2 goes round with Windows line ends, and a tokenizer
    # would make a token of each carriage return.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if join == "blank-lines":
        text = "\n\n".join(text.split("\n"))
    return text, hashlib.sha256(content).hexdigest()


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids ``[tokens]`` of a whole text, without special tokens."""
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(encoded, dtype=torch.int64)


def positions_of(config: Any) -> int | None:
    """The longest input that a model's configuration allows, or None if it names no limit."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(text_config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def choose_seq_len(asked: int | None, positions: int | None) -> int:
    """The window length: what is asked for, else the smaller of 2048 and the model's positions.

    Raises:
        SchemeError: less than 2 tokens, or more than the model has positions.
    """
    if asked is None:
        return min(DEFAULT_SEQ_LEN, positions or DEFAULT_SEQ_LEN)
    if asked < 2:
        raise SchemeError(f"a window needs at least 2 tokens, not {asked}: the first predicts none")
    if positions is not None and asked > positions:
        raise SchemeError(
            f"windows of {asked:,} tokens are longer than the model's {positions:,} positions. "
            f"Choose --seq-len {positions} or less."
        )
    return asked


def cut_windows(
    path: Path,
    tokenizer: Any,
    vocab_size: int,
    seq_len: int,
    max_windows: int | None = None,
    join: str = "as-is",
) -> Windows:
    """Read, tokenize and cut a text.

    Args:
        path: a UTF-8 file.
        tokenizer: of transformers.
        vocab_size: rows of the model's embedding; a larger token id is refused.
        seq_len: tokens of a window.
        max_windows: take only the first so many windows.
        join: see :func:`read_text`.

    Raises:
        CalibrationError: the file can not be used, or does not fill one window.
        CheckpointError: the tokenizer gives ids that the model does not have.
    """  # fmt: skip
    if max_windows is not None and max_windows < 1:
        raise SchemeError(f"max_windows must be at least 1, not {max_windows}")
    text, sha256 = read_text(path, join)
    ids = tokenize(tokenizer, text)
    count = len(ids) // seq_len
    if count == 0:
        raise CalibrationError(
            f"the text {path} has {len(ids):,} tokens, less than one window of {seq_len:,}. "
            f"Give a longer text, or a shorter window with --seq-len."
        )
    largest = int(ids.max())
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token id {largest:,}, and the model has {vocab_size:,} tokens. "
            "The tokenizer files in the folder belong to another model."
        )
    count = min(count, max_windows or count)
    ids_WL = ids[: count * seq_len].view(count, seq_len)
    return Windows(ids_WL, len(ids), sha256, join)


def logit_slices(logits_BLV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The logits of all predictions, ``[N, V]`` in slices small enough to copy as float32.

    The last position of each window predicts a token outside the window and is left out. Slices
    stay in the order of the flattened ``[B, L - 1]`` predictions.
    """
    rows = max(1, _SLICE_BYTES // (4 * logits_BLV.shape[-1]))
    begin = 0
    for logits_LV in logits_BLV[:, :-1]:
        for part_NV in logits_LV.split(rows):
            yield slice(begin, begin + len(part_NV)), part_NV
            begin += len(part_NV)


def token_nll(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each predicted token, float32 ``[B, L - 1]``."""
    targets_N = ids_BL[:, 1:].flatten()
    nll_N = torch.empty(targets_N.shape, dtype=torch.float32, device=logits_BLV.device)
    for where, part_NV in logit_slices(logits_BLV):
        nll_N[where] = torch.nn.functional.cross_entropy(
            part_NV.float(), targets_N[where], reduction="none"
        )
    return nll_N.view(ids_BL.shape[0], -1)


def mean_and_error(per_window_W: Tensor) -> tuple[float, float | None]:
    """Mean, and its standard error from the spread between windows (None for a single window).

    Tokens of one window share a context and are not independent; windows nearly are.
    """
    values = per_window_W.double()
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
