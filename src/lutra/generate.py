"""`lutra generate`: continue a prompt with a checkpoint, dense or quantized."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lutra.errors import CheckpointError, LutraError, SchemeError
from lutra.evaluate.load import choose_dtype, load_model, load_tokenizer, open_checkpoint, serve
from lutra.evaluate.perplexity import positions_of
from lutra.evaluate.size import measure_size


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    bits: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    tensor_parallel: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Continue a prompt.

    Args:
        path: the checkpoint's folder (or a hub id).
        prompt: the text to continue.
        max_new_tokens: at most so many; fewer where the model ends the text, or has no positions
            left.
        bits: run this lower precision of a file that serves several.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as ``lutra eval`` chooses.
        temperature: 0 takes the most likely token each time; above, tokens are drawn.
        top_p: draw from the smallest set of tokens that has this probability in all.
        seed: of the drawing.
        tensor_parallel: cut the model over the processes that torchrun has started.
        stream: called with each piece of text as soon as it is known.

    Returns:
        ``text`` (without the prompt), ``tokens_per_second`` (of all tokens after the first; None
        if there is one only), ``ttft_ms`` (time to the first token), ``prompt_tokens``,
        ``new_tokens``, ``stopped`` (``end`` of text, ``length`` asked for, ``positions``).

    Raises:
        LutraError: the prompt is empty, or leaves no position for a new token.
        SchemeError: an option that can not work.
        CheckpointError: the checkpoint or its tokenizer can not be used.
    """
    if not prompt.strip():
        raise LutraError("the prompt is empty. Give some text to continue with --prompt.")
    if max_new_tokens < 1:
        raise SchemeError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise SchemeError(
            f"temperature must not be negative and top_p lie above 0 and up to 1, not "
            f"{temperature} and {top_p}"
        )
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    prompt_tokens = int(inputs["input_ids"].shape[1])
    if prompt_tokens == 0:
        raise LutraError("the tokenizer makes no tokens of this prompt. Give some more text.")
    torch_dtype, _ = choose_dtype(dtype, measure_size(checkpoint.path).parameters, device)
    if tensor_parallel:
        from lutra.integrations.tensor_parallel import load_parallel, start

        start()
        if torch.device(device).type == "cuda":
            device = f"cuda:{torch.cuda.current_device()}"
        model = load_parallel(checkpoint.path, device, torch_dtype)
    else:
        model = load_model(checkpoint, device, torch_dtype)
    if bits is not None:
        serve(model, bits, checkpoint.path)
    positions = positions_of(model.config)
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - prompt_tokens)
    if room < 1:
        raise LutraError(
            f"the prompt has {prompt_tokens:,} tokens, and the model has {positions:,} positions: "
            "none is left for a new token. Shorten the prompt."
        )
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if int(inputs["input_ids"].max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} gives ids beyond the model's {vocab_size:,} "
            "tokens. The tokenizer files in the folder belong to another model."
        )
    clock = _Streamer(tokenizer, inputs["input_ids"][0].tolist(), stream)
    drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    ids = {
        name: inputs[name].to(device) for name in ("input_ids", "attention_mask") if name in inputs
    }
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)
        begin = time.perf_counter()
        output = model.generate(
            **ids,
            max_new_tokens=room,
            streamer=clock,
            pad_token_id=_padding(tokenizer, model),
            top_k=None,
            **drawing,
        )
    new_ids = output[0, prompt_tokens:]
    count = len(new_ids)
    times = clock.times
    seconds = times[-1] - times[0]
    stopped = "end" if count < room or int(new_ids[-1]) in _ends(model) else "length"
    if stopped == "length" and room < max_new_tokens:
        stopped = "positions"
    return {
        "text": clock.text(),
        "tokens_per_second": (count - 1) / seconds if count > 1 and seconds > 0 else None,
        "ttft_ms": 1000 * (times[0] - begin),
        "prompt_tokens": prompt_tokens,
        "new_tokens": count,
        "stopped": stopped,
    }


class _Streamer:
    """Notes when each token comes, and passes text on once its last character is certain.

    ``model.generate`` calls ``put`` with the prompt first, then with each new token.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: list[int], stream: Callable[[str], None] | None
    ) -> None:
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._stream = stream
        self._prompt_ids = prompt_ids
        self._prompt = self._decode([])
        self._ids: list[int] = []
        self._sent = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self._ids += value.flatten().tolist()
        if self._stream is not None:
            text = self.text()
            # A character may need several tokens: until all are there it decodes to U+FFFD.
            if not text.endswith("\ufffd"):
                self._send(text)

    def end(self) -> None:
        if self._stream is not None:
            self._send(self.text())

    def text(self) -> str:
        """What follows the prompt."""
        return self._decode(self._ids)[len(self._prompt) :]

    def _decode(self, ids: list[int]) -> str:
        # Behind the prompt, because decoders strip the space that begins a text.
        return str(self._tokenizer.decode(self._prompt_ids + ids, skip_special_tokens=True))

    def _send(self, text: str) -> None:
        if self._stream is not None and len(text) > len(self._sent):
            self._stream(text[len(self._sent) :])
            self._sent = text


def _ends(model: Any) -> set[int]:
    """Token ids that end a text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)


def _padding(tokenizer: Any, model: Any) -> int:
    """A padding id; nothing is padded, but transformers warns where there is none."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return min(_ends(model), default=0)


class _Verb(ModuleType):
    """``lutra.generate`` is this module once it is imported, and stays the verb it was before."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
