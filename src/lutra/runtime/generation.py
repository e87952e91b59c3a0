"""The decoding loop behind ``model.generate``, for one token per sequence and step.

transformers' ``generate`` takes a function in place of its loop (``custom_generate``); everything
around it, such as options, processors of logits and criteria for stopping, stays its own.
:func:`enable` gives a model a ``generate`` that passes :func:`decode` there, so nobody has to ask.
Greedy and sampled decoding on a GPU run here; anything else, and every model that can not be
recorded, runs transformers' own loop.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.runtime.blocks import fused_on_cpu
from lutra.runtime.step import DecodeStep, capacity_for

logger = logging.getLogger(__name__)

STEPS_KEPT = 2  # recordings of a model, each with a cache of its own


def enable(model: Any, devices: tuple[str, ...] | None = None) -> Any:
    """Let ``model.generate`` decode by steps on these kinds of devices; the model.

    It changes nothing on others. By default that is on GPUs, where steps are recorded, and on CPUs
    if the blocks of the model run there as few compiled calls.
    """
    if devices is None:
        devices = ("cuda", "cpu") if fused_on_cpu(model) else ("cuda",)
    model.lutra_decoding = _State(devices)
    model.generate = _Generate(model)
    return model


class _Generate:
    """``generate`` of a model for which :func:`enable` was called.

    It refers to the model weakly, so that a model's memory is free as soon as the model is dropped.
    A copy of the model has one of its own.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        update_wrapper(self, type(model).generate)
        self.__dict__.pop("__wrapped__")  # what it wraps takes the model as its first argument

    def __reduce__(self) -> tuple[Any, ...]:
        return _Generate, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise LutraError("the model of this generate() does not exist any more")
        own = type(model).generate
        state: _State = model.lutra_decoding
        asks = kwargs.keys() & {"custom_generate", "assistant_model"} or len(args) > 2
        if model.device.type in state.devices and not asks:
            # transformers drops the streamer of a custom loop, so it is bound here.
            without = {k: v for k, v in kwargs.items() if k != "streamer"}
            loop = partial(state.decode, streamer=kwargs.get("streamer"))
            try:
                return own(model, *args, **without, custom_generate=loop)
            except _LeftToTransformers as left:
                logger.debug("transformers' own loop decodes: %s", left)
        return own(model, *args, **kwargs)


class _LeftToTransformers(Exception):
    """A call that this loop does not serve, and why. Raised before anything is computed."""


class _State:
    """The recordings of one model."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        self.devices = devices
        self.steps: OrderedDict[tuple[Any, ...], DecodeStep] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (self.devices,)  # a copy has no recordings: they read the original's weights

    def decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What ``generate`` calls in place of its own loop, with the same arguments."""
        reason = why_not(model, input_ids, generation_config, synced_gpus, model_kwargs)
        if reason is None and not self.lock.acquire(blocking=False):
            reason = "another thread is decoding with this model"
        if reason is not None:
            raise _LeftToTransformers(reason)
        try:
            if streamer is not None:
                streamer.put(input_ids.cpu())
            with torch.inference_mode(False), torch.no_grad():
                return self._loop(
                    model, input_ids, logits_processor, stopping_criteria, generation_config,
                    streamer, model_kwargs.get("attention_mask"),
                )  # fmt: skip
        finally:
            self.lock.release()

    def _step(self, model: Any, batch: int, tokens: int, **choice: Any) -> DecodeStep:
        key = (batch, capacity_for(tokens), *sorted(choice.items()))
        step = self.steps.pop(key, None)
        if step is None or not step.is_current():
            stale = [k for k, s in self.steps.items() if not s.is_current()]
            for k in stale:
                del self.steps[k]
            while len(self.steps) >= STEPS_KEPT:
                self.steps.popitem(last=False)
            step = DecodeStep(model, batch, capacity_for(tokens), **choice)
        self.steps[key] = step
        return step

    def _loop(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any,
        streamer: Any, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        batch, length = input_ids.shape
        limit = _limit(model, length, config)
        ends = _plain_ends(criteria)
        greedy = not config.do_sample and not processors and ends is not None
        if mask is not None and (mask.shape != input_ids.shape or bool(mask.all())):
            mask = None
        padding = getattr(config, "_pad_token_tensor", None)
        padding = int(padding) if padding is not None else 0
        try:
            if greedy:
                assert ends is not None
                step = self._step(
                    model, batch, limit, greedy=True, ends=ends, padding=padding if ends else 0
                )
                return _greedy(step, input_ids, mask, limit, ends, streamer)
            step = self._step(model, batch, limit, greedy=False)
            has_ends = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
            return _general(
                step, input_ids, mask, limit, processors, criteria, config, streamer,
                padding if has_ends else None,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            self.steps.clear()
            raise


def why_not(
    model: Any, ids: Tensor, config: Any, synced_gpus: bool, model_kwargs: dict[str, Any]
) -> str | None:
    """Why a call of ``generate`` is left to transformers' own loop, in words, or None."""
    from transformers.generation.configuration_utils import GenerationMode

    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the mode is {mode.value}"
    if synced_gpus or model.training or model.config.is_encoder_decoder:
        return "the model is trained, or an encoder's output is decoded"
    if not config.use_cache or config.cache_implementation not in (None, "static", "dynamic"):
        return "another kind of cache, or none, is asked for"
    if config.return_dict_in_generate or config.prefill_chunk_size is not None:
        return "more than the tokens is asked for"
    cache = model_kwargs.get("past_key_values")
    if cache is not None and _length_of(cache) > 0:
        return "a cache is continued"
    known = {"attention_mask", "past_key_values", "use_cache", "position_ids", "logits_to_keep"}
    others = sorted(k for k, v in model_kwargs.items() if k not in known and v is not None)
    if others:
        return f"the model gets {', '.join(others)}"
    if ids.shape[1] == 0:
        raise LutraError("the prompt has no tokens. Give at least one.")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not _pads_on_the_left(mask):
        return "the attention mask is not that of padding on the left"
    return why_not_recorded(model, config.max_length)


def _pads_on_the_left(mask: Tensor) -> bool:
    if mask.dim() != 2 or mask.shape[1] == 0:
        return False
    return bool((mask[:, -1] == 1).all() & (mask[:, 1:] >= mask[:, :-1]).all())


def why_not_recorded(model: Any, tokens: int) -> str | None:
    """Why no step of a model can be recorded for so many tokens, in words, or None."""
    config = model.config.get_text_config()
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model is spread over devices"
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"attention is {model.config._attn_implementation}, not sdpa"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds - {"full_attention", "sliding_attention"}:
        return f"layers are of kinds {sorted(kinds)}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and tokens > window:
        return f"{tokens} tokens pass the sliding window of {window}"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        return "its rotary embedding depends on the length of the text"
    return None


def _length_of(cache: Any) -> int:
    return int(cache.get_seq_length())


def _limit(model: Any, length: int, config: Any) -> int:
    """Tokens that a text may have in all; positions that are learned end somewhere."""
    limit = int(config.max_length)
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    learned = getattr(text, "rope_parameters", None) is None
    if positions is not None and learned and limit > positions:
        raise LutraError(
            f"the prompt has {length:,} tokens and {limit - length:,} new ones are asked for, "
            f"but the model has {positions:,} positions. "
            + (
                f"Ask for at most {positions - length:,} new tokens."
                if length < positions
                else "Shorten the prompt."
            )
        )
    return limit


def _plain_ends(criteria: Any) -> tuple[int, ...] | None:
    """Tokens that end a text, if nothing else does but its length; None if something does."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    ends: tuple[int, ...] = ()
    for criterion in criteria or ():
        if type(criterion) is EosTokenCriteria:
            ends += tuple(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is not MaxLengthCriteria:
            return None
    return ends


def _greedy(
    step: DecodeStep, ids: Tensor, mask: Tensor | None, limit: int, ends: tuple[int, ...],
    streamer: Any,
) -> Tensor:  # fmt: skip
    """Likeliest tokens; the host looks at a token while a recorded step computes the next one."""
    length = ids.shape[1]
    finished = torch.zeros(step.batch, dtype=torch.bool)
    arrived = _Arrivals(step)
    end = torch.tensor(ends, dtype=torch.int64)
    step.prefill(ids, mask)
    arrived.expect(length)
    known = length  # tokens whose values the host has seen
    for queued in range(length + 1, limit + 1):
        ahead = step.is_recorded  # recording takes a while, in which nobody should wait
        if ahead and queued < limit:
            step.advance()
            arrived.expect(queued)
        tokens = arrived.get(known)
        known += 1
        if streamer is not None:
            streamer.put(tokens)
        if ends:
            finished |= (tokens[:, None] == end).any(1)
        if bool(finished.all()):
            break
        if not ahead and queued < limit:
            step.advance()
            arrived.expect(queued)
    if streamer is not None:
        streamer.end()
    return torch.cat([ids, step.tokens[length:known].T], dim=1)


class _Arrivals:
    """Tokens on their way to the host, in a stream beside the one that computes."""

    def __init__(self, step: DecodeStep) -> None:
        self.step = step
        self.on_gpu = step.device.type == "cuda"
        self.stream = torch.cuda.Stream(step.device) if self.on_gpu else None
        self.waiting: dict[int, tuple[Tensor, Any]] = {}

    def expect(self, position: int) -> None:
        """The token at ``position`` has been queued for computation."""
        row = self.step.tokens[position]
        if self.stream is None:
            self.waiting[position] = (row.clone(), None)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.step.device))
        with torch.cuda.stream(self.stream):
            host = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            host.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.waiting[position] = (host, event)

    def get(self, position: int) -> Tensor:
        host, event = self.waiting.pop(position)
        if event is not None:
            event.synchronize()
        return host


def _general(
    step: DecodeStep, ids: Tensor, mask: Tensor | None, limit: int, processors: Any,
    criteria: Any, config: Any, streamer: Any, padding: int | None,
) -> Tensor:  # fmt: skip
    """Tokens drawn, or chosen after processors of logits, with any criteria for stopping."""
    logits = step.prefill(ids, mask)
    unfinished = torch.ones(step.batch, dtype=torch.long, device=ids.device)
    while True:
        scores = processors(ids, logits.to(torch.float32, copy=True))
        if config.do_sample:
            token = torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)
        else:
            token = scores.argmax(-1)
        if padding is not None:
            token = token * unfinished + padding * (1 - unfinished)
        ids = torch.cat([ids, token[:, None]], dim=1)
        if streamer is not None:
            streamer.put(token.cpu())
        unfinished = unfinished & ~criteria(ids, None)
        if ids.shape[1] >= limit or not bool(unfinished.any()):
            break
        step.ids.copy_(token[:, None])
        logits = step.advance()
    if streamer is not None:
        streamer.end()
    return ids
