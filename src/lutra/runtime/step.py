"""One token of a model, recorded once as a CUDA graph and replayed for every further token.

A token of a large model is some hundreds of launches of a few microseconds each, which Python can
not issue as fast as the GPU runs them. The graph holds them all, from the embedding to the choice
of the likeliest token and the advance of the position, so that replaying it is one call and tokens
follow each other without the host.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.nn import QuantizedLinear
from lutra.nn_flat import FlatLinear
from lutra.runtime.blocks import FusedBlocks, why_not_fused
from lutra.runtime.cache import StepCache

logger = logging.getLogger(__name__)

LEAST_CAPACITY = 256


def capacity_for(tokens: int) -> int:
    """Size of the cache for so many tokens: a power of two, and from 4096 on a multiple of 2048.

    Few sizes, so that one recording serves many prompts; larger ones cost memory and no time where
    blocks are fused, as attention reads what is filled alone.
    """
    if tokens > 4096:
        return -(-tokens // 2048) * 2048
    capacity = LEAST_CAPACITY
    while capacity < tokens:
        capacity *= 2
    return capacity


class DecodeStep:
    """Decoding with one model for a fixed number of sequences and a fixed size of the cache.

    Call :meth:`prefill`, then :meth:`advance` for each token.

    Args:
        model: a causal language model of transformers in ``eval`` mode, on one device.
        batch: sequences.
        capacity: tokens of the cache, prompt included.
        greedy: whether the step chooses the likeliest token itself; otherwise the caller puts the
            token into :attr:`ids` before each step.
        ends, padding: tokens that end a sequence, and what it is filled with behind them (greedy).
        fused: use the substitutes of :mod:`lutra.runtime.blocks` where they exist.

    Attributes:
        ids: int64 ``[batch, 1]``, the tokens that the next step reads.
        tokens: int64 ``[capacity + 1, batch]``, by position; greedy steps write their choice here.
        logits: ``[batch, vocabulary]`` of the last step.
        fallback: why the model's own blocks run, or None.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        capacity: int,
        *,
        greedy: bool = True,
        ends: Sequence[int] = (),
        padding: int = 0,
        fused: bool = True,
    ) -> None:
        device = model.get_input_embeddings().weight.device
        self._model = weakref.ref(model)
        self.batch, self.capacity, self.greedy = batch, capacity, greedy
        self.device, self.padding = device, padding
        self.cache = StepCache(model.config.get_text_config().num_hidden_layers, capacity, device)
        self.ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.tokens = torch.zeros((capacity + 1, batch), dtype=torch.int64, device=device)
        self.start = torch.zeros(batch, dtype=torch.int32, device=device)
        self.unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self._ends = torch.tensor(list(ends), dtype=torch.int64, device=device)
        self._rows = torch.arange(capacity, device=device)
        self._no_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        self._graph: Any = None
        self.fallback = why_not_fused(model) if fused else "not asked for"
        self._blocks: FusedBlocks | None = None
        if self.fallback is None:
            self._blocks = FusedBlocks(model, batch, self.cache, self.start)
        else:
            logger.debug("blocks of %s are not fused: %s", type(model).__name__, self.fallback)
        # On a CPU, blocks of many rows are bound by the products whatever runs between them.
        self._reads_fused = self._blocks is not None and device.type == "cuda"
        self._fingerprint = fingerprint(model)

    @property
    def model(self) -> Any:
        """The model, which keeps its recordings, so they refer to it weakly."""
        model = self._model()
        if model is None:
            raise LutraError("the model of this decoding step does not exist any more")
        return model

    @property
    def is_recorded(self) -> bool:
        """Whether a CUDA graph is replayed."""
        return self._graph is not None

    def is_current(self) -> bool:
        """Whether the model's weights are where they were when this was made."""
        return self._fingerprint is None or self._fingerprint == fingerprint(self.model)

    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read a prompt; the logits ``[batch, vocabulary]`` of its last token.

        Args:
            ids: ``[batch, length]``, padded on the left.
            attention_mask: ``[batch, length]``, 0 where padding is; None if there is none.
        """
        length = ids.shape[1]
        self.cache.begin()
        positions = torch.arange(length, device=self.device)[None].expand(self.batch, -1)
        self.start.zero_()
        if attention_mask is not None:
            self.start.copy_(length - attention_mask.sum(1))
            positions = (positions - self.start[:, None]).clamp(min=0)
        context: Any = contextlib.nullcontext()
        if self._reads_fused and attention_mask is None:
            assert self._blocks is not None
            context = self._blocks.in_place(length)
        with context:
            output = self.model(
                input_ids=ids, attention_mask=attention_mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        self.cache.position.fill_(length)
        self.unfinished.fill_(True)
        if self._fingerprint is None or self._graph is None:
            self._fingerprint = fingerprint(self.model)  # kernels have prepared their weights
        logits = output.logits[:, -1]
        if self.greedy:
            self.cache.position.sub_(1)  # choosing writes behind the position
            self._choose(logits)
            self.cache.position.add_(1)
        return logits

    def advance(self) -> Tensor:
        """Run the model on :attr:`ids` at the next position; logits ``[batch, vocabulary]``.

        A recorded step returns the same memory each time.
        """
        if self.device.type == "cuda" and self._graph is None:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self.logits = self._one()
        assert self.logits is not None
        return self.logits

    def _record(self) -> None:
        state = (self.ids, self.unfinished, self.cache.position)
        before = [t.clone() for t in state]

        def restore() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._one()  # compiles, loads and allocates what can not be while a graph is recorded
            restore()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.logits = self._one()
        self._graph = graph
        restore()

    def _one(self) -> Tensor:
        """The model on one token of each sequence, at the shared position."""
        position = self.cache.position
        positions = (position - self.start)[:, None]
        context: Any = contextlib.nullcontext()
        if self._blocks is not None:
            context = self._blocks.in_place()
            mask = self._no_mask
        else:
            mask = (self._rows <= position) & (self._rows >= self.start[:, None])
            mask = mask[:, None, None]
            if self.model.config._attn_implementation != "sdpa":
                low = torch.finfo(self.model.dtype).min
                mask = torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, low)
        with context:
            output = self.model(
                input_ids=self.ids, attention_mask=mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            )  # fmt: skip
        logits = output.logits[:, -1]
        if self.greedy:
            self._choose(logits)
        position.add_(1)
        return logits

    def _choose(self, logits: Tensor) -> None:
        token = likeliest(logits)
        if self._ends.numel():
            token = torch.where(self.unfinished, token, self.padding)
            self.unfinished.logical_and_((token[:, None] != self._ends).all(1))
        self.ids.copy_(token[:, None])
        self.tokens.index_copy_(0, self.cache.position + 1, token[None])


def likeliest(logits: Tensor) -> Tensor:
    """``logits.argmax(-1)``, the first of equals, in pieces: torch gives a row to one processor."""
    pieces = next((n for n in (256, 128, 64, 32, 16) if logits.shape[-1] % n == 0), 1)
    best, place = logits.view(logits.shape[0], pieces, -1).max(-1)
    piece = best.argmax(-1, keepdim=True)
    return (piece * (logits.shape[-1] // pieces) + place.gather(1, piece)).squeeze(1)


def fingerprint(model: Any) -> tuple[int, ...]:
    """Where all the tensors lie that a recording reads."""
    held = [t.data_ptr() for t in model.parameters()]
    held += [t.data_ptr() for t in model.buffers()]
    for module in model.modules():
        if isinstance(module, QuantizedLinear | FlatLinear):
            held += [t.data_ptr() for t in module.prepared_tensors()]
    return tuple(held)
