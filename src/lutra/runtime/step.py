"""One token of a model, recorded once as a CUDA graph and replayed for every further token.

A token of a large model is some hundreds of launches of a few microseconds each, which Python can
not issue as fast as the GPU runs them. The graph holds them all, from the embedding to the choice
of the likeliest token and the advance of the position, so that replaying it is one call and tokens
follow each other without the host.

Prompts of up to :data:`MOST_PADDED_ROWS` tokens are bound by the launches too. They are filled up
on the right to one of a few lengths, and the second prompt of a length is recorded. What is filled
up comes behind the prompt, so causal attention does not see it, and the rows of the cache that it
leaves are written anew before a token sees them.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutra.errors import LutraError
from lutra.packed import PackedLinear
from lutra.runtime.blocks import FusedBlocks, why_not_fused
from lutra.runtime.cache import StepCache

logger = logging.getLogger(__name__)

LEAST_CAPACITY = 256
#: Lengths to which prompts are filled up, so that few recordings serve all of them.
PROMPT_LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
MOST_PADDED_ROWS = 1024  # of all sequences; more keep the GPU busy longer than Python the host
PROMPTS_KEPT = 4  # recordings of prompts in one memory pool, those used last
ROOM = 1 << 30  # bytes that must be free to record a prompt: its activations lie in own memory


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


@dataclass
class _Prompt:
    """Prompts of one length: how often they came, and the recording of what they compute."""

    ids: Tensor  # int64 [batch, length], filled up
    uses: int = 0
    graph: Any = None
    logits: Tensor | None = None


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
        self._length = torch.zeros(1, dtype=torch.int64, device=device)  # of filled-up prompts
        self._prompts: OrderedDict[int, _Prompt] = OrderedDict()
        self._pool: Any = None
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
        padded = None if attention_mask is not None else self._padded_length(length)
        if padded is not None:
            logits = self._read_padded(ids, padded)
        else:
            self._length.fill_(length)
            self.start.zero_()
            positions = torch.arange(length, device=self.device)[None].expand(self.batch, -1)
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
            logits = output.logits[:, -1]
            self._end_prompt(logits)
        self.cache.end_prompt(length)
        if self._graph is None and not self.recorded_prompts():
            self._fingerprint = fingerprint(self.model)  # kernels have prepared their weights
        return logits

    def recorded_prompts(self) -> list[int]:
        """Lengths of which a recording of the prompt is replayed."""
        return sorted(n for n, prompt in self._prompts.items() if prompt.graph is not None)

    def _end_prompt(self, logits: Tensor) -> None:
        """Put the state behind prompts of :attr:`_length` tokens; choose the first new token."""
        self.unfinished.fill_(True)
        self.cache.position.copy_(self._length)
        if self.greedy:
            self._choose(logits)

    def _padded_length(self, length: int) -> int | None:
        """Tokens to which prompts are filled up; None if they are read as they are."""
        if not self._reads_fused:
            return None
        padded = next((n for n in PROMPT_LENGTHS if n >= length), None)
        if padded is None or padded * self.batch > MOST_PADDED_ROWS or padded > self.capacity:
            return None
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None)
        return None if positions is not None and padded > positions else padded

    def _read_padded(self, ids: Tensor, padded: int) -> Tensor:
        """Prompts filled up to a length, by a replay from the third time on."""
        prompt = self._prompts.pop(padded, None)
        if prompt is None:
            while len(self._prompts) >= PROMPTS_KEPT:
                self._prompts.popitem(last=False)
            room = torch.zeros((self.batch, padded), dtype=torch.int64, device=self.device)
            prompt = _Prompt(room)
        self._prompts[padded] = prompt
        prompt.uses += 1
        prompt.ids[:, : ids.shape[1]].copy_(ids)
        self._length.fill_(ids.shape[1])
        if prompt.graph is None and prompt.uses > 1 and self._has_room():
            # The first use has compiled, loaded and prepared what can not be during a recording.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                prompt.logits = self._prompt_pass(prompt.ids)
            prompt.graph = graph
        if prompt.graph is None:
            return self._prompt_pass(prompt.ids)
        prompt.graph.replay()
        assert prompt.logits is not None
        return prompt.logits

    def _has_room(self) -> bool:
        """Whether a prompt may be recorded: on a GPU, alone, with memory for its activations."""
        if self.device.type != "cuda":
            return False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False  # sums over ranks of so many values go through NCCL
        return torch.cuda.mem_get_info(self.device)[0] >= ROOM

    def _prompt_pass(self, ids: Tensor) -> Tensor:
        """The model on filled-up prompts of :attr:`_length` tokens; logits of their last ones."""
        assert self._blocks is not None
        padded = ids.shape[1]
        self.start.zero_()
        positions = torch.arange(padded, device=self.device)[None].expand(self.batch, -1)
        first = torch.arange(self.batch, device=self.device) * padded
        with self._blocks.in_place(padded, first + (self._length - 1)):
            output = self.model(
                input_ids=ids, attention_mask=self._no_mask, position_ids=positions,
                past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        logits: Tensor = output.logits[:, -1]
        self._end_prompt(logits)
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
        position.add_(1)
        if self.greedy:
            self._choose(logits)
        return logits

    def _choose(self, logits: Tensor) -> None:
        """Put the likeliest token at the position; each launch here is one of every token."""
        likeliest(logits, self.ids)
        if self._ends.numel():
            going_on = self.unfinished[:, None]
            self.ids.copy_(torch.where(going_on, self.ids, self.padding))
            self.unfinished.logical_and_((self.ids != self._ends).all(1))
        self.tokens.index_copy_(0, self.cache.position, self.ids.T)


def likeliest(logits: Tensor, out: Tensor) -> Tensor:
    """``logits.argmax(-1, keepdim=True)``, the first of equals, into ``out``.

    It goes in pieces, because torch gives a row to one processor.
    """
    pieces = next((n for n in (256, 128, 64, 32, 16) if logits.shape[-1] % n == 0), 1)
    best, place = logits.view(logits.shape[0], pieces, -1).max(-1)
    piece = best.argmax(-1, keepdim=True)
    return torch.add(place.gather(1, piece), piece, alpha=logits.shape[-1] // pieces, out=out)


def fingerprint(model: Any) -> tuple[int, ...]:
    """Where all the tensors lie that a recording reads.

    It is asked for before each text, so the modules are walked by hand: ``model.parameters()`` and
    its like take milliseconds on a large model.
    """
    held: list[int] = []
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        for tensors in (module._parameters, module._buffers):
            held += [t.data_ptr() for t in tensors.values() if t is not None]
        if isinstance(module, PackedLinear):
            held += [t.data_ptr() for t in module.prepared_tensors()]
        waiting += module._modules.values()
    return tuple(held)
