"""Decoder blocks of known families in eight launches, for one token per sequence or for prompts.

While a step is recorded or a prompt is read, the blocks of the model and its last norm run the
functions below instead of their own ``forward``; outside of it nothing is changed. They call the
model's own linear layers and compute what its own blocks compute, with two sums less: a block hands
the result of its MLP on unsummed (:class:`Unsummed`), and the norm of the next block adds it.

A model of another family, or one with a shape that the kernels do not know, keeps its own blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lutra.kernels.cpu import token_step as on_cpu
from lutra.kernels.cuda.token_step import (
    AttentionShape,
    activation,
    add_norm,
    attention,
    prompt_attention,
    unsupported,
)
from lutra.kernels.flat.before import Activation
from lutra.kernels.flat.deferred import Deferred
from lutra.nn_flat import FlatLinear
from lutra.packed import PackedLinear
from lutra.runtime.cache import StepCache


@dataclass
class Unsummed:
    """Hidden states ``sum + delta``, rows ``[batch, features]``, whose sum the next norm makes."""

    sum: Tensor
    delta: Tensor


@dataclass(frozen=True)
class _Family:
    block: str  # name of the class
    layer_norm: bool
    norms: tuple[str, str]
    output: str


_GATED = ("input_layernorm", "post_attention_layernorm")
_FAMILIES = {
    f.block: f
    for f in (
        *(
            _Family(f"{name}DecoderLayer", False, _GATED, "o_proj")
            for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
        ),
        _Family("OPTDecoderLayer", True, ("self_attn_layer_norm", "final_layer_norm"), "out_proj"),
    )
}


class FusedBlocks:
    """The substitutes for the blocks of one model.

    Args:
        model: a causal language model of transformers.
        batch: sequences that are decoded together.
        cache: where keys and values lie; its layers are initialized.
        start: int32 ``[batch]``, padding before each sequence.
    """

    def __init__(self, model: Any, batch: int, cache: StepCache, start: Tensor) -> None:
        self.batch, self.cache, self.start = batch, cache, start
        self._length: int | None = None  # of the prompts that are read; None for one token
        self._last: Tensor | None = None  # rows of which the result is wanted; None: of the ends
        blocks, norm = _parts(model)
        shapes = {_attention_shape(block) for block in blocks}
        (shape,) = shapes
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
            (block, self._forward_of(block, shape)) for block in blocks
        ]
        self._forwards.append((norm, self._last_norm(norm)))
        rotary = getattr(model.model, "rotary_emb", None)
        if rotary is not None:
            self._forwards.append((rotary, self._rotary_table(rotary, norm.weight)))

    @contextmanager
    def in_place(self, length: int | None = None, last: Tensor | None = None) -> Iterator[None]:
        """The model runs the substitutes within this context.

        Args:
            length: of the prompts that it reads, which have no padding; None for one token of each
                sequence at the cache's position.
            last: int64 ``[batch]``, for each prompt the row among all of them whose result is
                wanted; None for that at its end.
        """
        self._length, self._last = length, last
        try:
            for module, forward in self._forwards:
                module.forward = forward
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)

    def _norm(self, norm: nn.Module, hidden: Tensor | Unsummed) -> tuple[Tensor, Tensor]:
        x, delta = (hidden.sum, hidden.delta) if isinstance(hidden, Unsummed) else (hidden, None)
        x = x.reshape(-1, x.shape[-1])
        bias = getattr(norm, "bias", None)
        weight: Any = norm.weight
        return add_norm(x, delta, weight, bias, _epsilon(norm), isinstance(norm, nn.LayerNorm))

    def _forward_of(self, block: Any, shape: AttentionShape) -> Callable[..., Any]:
        family = _FAMILIES[type(block).__name__]
        own = block.self_attn
        first, second = (getattr(block, name) for name in family.norms)
        projections = (own.q_proj, own.k_proj, own.v_proj)
        output = getattr(own, family.output)
        layer = self.cache.step_layers[own.layer_idx]
        norms = (own.q_norm.weight, own.k_norm.weight) if hasattr(own, "q_norm") else None

        def mlp(x: Tensor) -> Tensor:
            if family.layer_norm:
                return after_activation(block.fc2, block.fc1(x), gated=False)
            gate_up = joint_product((block.mlp.gate_proj, block.mlp.up_proj), x)
            return after_activation(block.mlp.down_proj, gate_up, gated=True)

        def forward(
            hidden_states: Tensor | Unsummed,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **_: Any,
        ) -> Unsummed:
            total, x = self._norm(first, hidden_states)
            rotary = None
            if position_embeddings is not None:
                cosine, sine = (t.reshape(-1, shape.head_dim) for t in position_embeddings)
                rotary = (cosine, sine)
            qkv = joint_product(projections, x)
            if self._length is None:
                mixed = attention(
                    qkv, layer.keys, layer.values, self.cache.position, self.start, shape, rotary,
                    norms,
                )  # fmt: skip
            else:
                like = qkv.new_empty(self.batch, shape.kv_heads, 0, shape.head_dim)
                keys, values = layer.begin(like, self._length)
                mixed = prompt_attention(qkv, keys, values, shape, rotary, norms)
            total, x = self._norm(second, Unsummed(total, output(mixed)))
            return Unsummed(total, mlp(x))

        return forward

    def _rotary_table(self, rotary: nn.Module, like: Tensor) -> Callable[..., Any]:
        """Cosines and sines of all positions, computed once by the model's own module."""
        positions = torch.arange(self.cache.capacity, device=like.device)[None]
        cosine, sine = (t[0].contiguous() for t in rotary(like, position_ids=positions))

        def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            at = position_ids.flatten()
            return cosine.index_select(0, at), sine.index_select(0, at)

        return forward

    def _last_norm(self, norm: nn.Module) -> Callable[..., Any]:
        def forward(hidden_states: Tensor | Unsummed) -> Tensor:
            if self._length is not None and isinstance(hidden_states, Unsummed):
                last: Any = self._last
                if last is None:
                    last = slice(self._length - 1, None, self._length)  # of each prompt
                hidden_states = Unsummed(hidden_states.sum[last], hidden_states.delta[last])
            return self._norm(norm, hidden_states)[1].view(self.batch, 1, -1)

        return forward


def why_not_fused(model: Any) -> str | None:
    """Why a model keeps its own blocks, in words, or None if it can run the substitutes."""
    try:
        blocks, norm = _parts(model)
    except AttributeError:
        return f"the family {model.config.model_type!r} has no substitutes for its blocks"
    for block in blocks:
        if type(block).__name__ not in _FAMILIES:
            return f"the family {model.config.model_type!r} has no substitutes for its blocks"
    shapes = {_attention_shape(block) for block in blocks}
    if len(shapes) != 1:
        return "its blocks differ in shape"
    (shape,) = shapes
    weight = norm.weight
    refusal = unsupported(shape, weight.shape[0], weight.dtype, weight.device)
    if refusal is not None:
        return refusal
    config = model.config
    if config.model_type == "opt":
        if not config.do_layer_norm_before or config.activation_function != "relu":
            return "this variant of OPT norms after the sum, or has no ReLU"
        if not config.layer_norm_elementwise_affine:
            return "its norms have no weights"
    elif config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not SiLU"
    return None


def fused_on_cpu(model: Any) -> bool:
    """Whether a model's blocks run as compiled calls on a CPU, not as the same calls of torch."""
    if model.config.model_type == "opt" or why_not_fused(model) is not None:
        return False
    blocks, norm = _parts(model)
    weight = norm.weight
    return on_cpu.serves(_attention_shape(blocks[0]).head_dim, weight.shape[0], weight.dtype)


def _parts(model: Any) -> tuple[Any, Any]:
    """The blocks of a model and the norm behind them."""
    if model.config.model_type == "opt":
        return model.model.decoder.layers, model.model.decoder.final_layer_norm
    return model.model.layers, model.model.norm


def _attention_shape(block: Any) -> AttentionShape:
    own = block.self_attn
    d = own.head_dim
    epsilon = _epsilon(own.q_norm) if hasattr(own, "q_norm") else 0.0
    heads, kv_heads = (p.out_features // d for p in (own.q_proj, own.k_proj))
    return AttentionShape(heads, kv_heads, d, own.scaling, epsilon)


def _epsilon(norm: Any) -> float:
    return float(norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon)


def after_activation(layer: Any, x: Tensor, gated: bool) -> Tensor:
    """The last layer of an MLP, with the activation before it or, if it can, on its way."""
    if isinstance(layer, FlatLinear):
        first, second = x.chunk(2, dim=-1) if gated else (x, None)
        before = Activation("silu" if gated else "relu", second)
        if layer.reads(before, x.dtype):
            return layer(Deferred(first, before, lambda: activation(x, gated)))
    y: Tensor = layer(activation(x, gated))
    return y


def joint_product(layers: tuple[Any, ...], x: Tensor) -> Tensor:
    """``[batch, sum of out_features]``: the results of layers with one input, side by side."""
    first = layers[0]
    if isinstance(first, PackedLinear) and first.siblings is not None:
        whole = first.siblings.whole(x, layers)
        if whole is not None:
            return whole
    if all(type(layer) is nn.Linear for layer in layers):
        y = x.new_empty(x.shape[0], sum(layer.out_features for layer in layers))
        begin = 0
        for layer in layers:
            part = y[:, begin : begin + layer.out_features]
            if layer.bias is None:
                torch.mm(x, layer.weight.T, out=part)
            else:
                torch.addmm(layer.bias, x, layer.weight.T, out=part)
            begin += layer.out_features
        return y
    return torch.cat([layer(x) for layer in layers], dim=-1)
