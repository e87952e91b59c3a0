"""What lies between the linear layers of a block.

Three operations, each one launch on a GPU (``token_*.cu``), one call on a CPU
(:mod:`lutra.kernels.cpu.token_step`) and plain torch elsewhere: the norm
with the residual sum before it, the activation of the MLP, and attention with rotary embedding and
the write to the key-value cache. Measured on an H200, torch takes about thirty launches for them,
which cost more than the linear layers of a block of 4096 features when one token is decoded.

The first two take any number of rows. Attention is that of one new token per sequence, or of whole
prompts, where torch's flash attention follows one launch for all else (``prompt_heads.cu``).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lutra.kernels.cpu import token_step as on_cpu

if TYPE_CHECKING:
    from lutra.kernels.cuda.launch import Card, Function

HEAD_DIMS = (64, 128, 256)
TILE = 16  # positions that a warp of the attention reads at once
MOST_PARTS = 8  # of the positions of a sequence: blocks of a cluster


def most_queries(head_dim: int) -> int:
    """Heads that may share a key head: as many as registers hold the sums of."""
    return 16 if head_dim <= 128 else 8


class _NormArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("features", ctypes.c_int),
        ("epsilon", ctypes.c_float),
    ]


class _ActivationArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("features", ctypes.c_int),
    ]


class _AttentionArguments(ctypes.Structure):
    _fields_ = [
        ("qkv", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rotary_stride", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    ]


class _HeadsArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "qkv", "cosine", "sine", "query_norm", "key_norm", "keys", "values",
        )),
        *((name, ctypes.c_int) for name in ("heads", "kv_heads", "first", "length", "capacity")),
        ("epsilon", ctypes.c_float),
    ]  # fmt: skip


class _SumArguments(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("received", ctypes.c_void_p * 8),
        ("calls", ctypes.c_void_p),
        ("rank", ctypes.c_int),
        ("ranks", ctypes.c_int),
        ("packets", ctypes.c_int),
        ("capacity", ctypes.c_int),
    ]


@dataclass(frozen=True)
class AttentionShape:
    """Shape of the attention of one layer.

    Attributes:
        heads, kv_heads, head_dim: query heads, key heads, channels of a head.
        scale: of the products of queries and keys.
        epsilon: of the norms of heads, where there are any.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    epsilon: float = 0.0

    @property
    def queries(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def unsupported(
    shape: AttentionShape, hidden: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a model of this shape can not run here, in words, or None. Torch runs every shape."""
    if device.type != "cuda":
        return None
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {dtype}, not float16 or bfloat16"
    if shape.head_dim not in HEAD_DIMS:
        return f"heads have {shape.head_dim} channels, not 64, 128 or 256"
    if shape.queries > most_queries(shape.head_dim):
        return f"{shape.queries} heads share a key head; {most_queries(shape.head_dim)} can"
    if hidden % 8:
        return f"{hidden} features are not a multiple of 8"
    return None


def attention_shared_bytes(shape: AttentionShape, warps: int) -> int:
    """Shared memory of a block, of which 48 KiB can be had: sums and marks that come together."""
    eights = -(-shape.queries // 8)
    sums = 4 * warps * shape.queries * shape.head_dim
    return sums + MOST_PARTS * warps * eights * 64 + 2 * shape.head_dim


def attention_plan(
    shape: AttentionShape, batch: int, capacity: int, device: Card
) -> tuple[int, int]:  # fmt: skip
    """Warps of a block, and blocks among which the positions of a sequence are divided.

    Each warp has one tile of positions in flight, so a processor should have some eight warps and
    more; and all blocks should run at once. What is best was measured on an H200.
    """
    pairs, tiles = batch * shape.kv_heads, -(-capacity // TILE)
    parts = 1
    if device.capability >= (9, 0):  # clusters
        while parts < MOST_PARTS and 4 * parts * pairs < 3 * device.processors:
            if parts * 4 >= tiles:
                break
            parts *= 2
    blocks = -(-parts * pairs // device.processors)  # of a processor
    warps = 4
    if blocks == 1 and tiles > 4 * parts:
        warps = 8
    elif blocks == 2 and tiles <= 64:
        warps = 6
    while attention_shared_bytes(shape, warps) > 49152:
        warps -= 2
    return warps, parts


def norm_plan(rows: int, features: int, clusters: bool) -> tuple[int, int, int]:
    """Blocks that share a row, threads of a block, and vectors of 8 values of a thread.

    Args:
        clusters: whether blocks can meet in clusters.
    """
    vectors = features // 8
    # A block by itself finds room beside the product ahead of it sooner than a cluster: in a model
    # of 4096 features that is worth 3.5 % of a token, though by themselves both take as long.
    if clusters and rows <= 64 and vectors > 512:
        for cluster in (8, 4, 2):
            threads = vectors // cluster
            if vectors % (32 * cluster) == 0 and threads <= 1024:
                return cluster, threads, 1
    return 1, 512, -(-vectors // 512)


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    layer_norm: bool,
) -> tuple[Tensor, Tensor]:
    """``h = x + delta`` and the norm of h, for rows ``[batch, features]``; returns ``(h, y)``."""
    if x.device.type != "cuda":
        if x.device.type == "cpu" and not layer_norm:
            done = on_cpu.add_norm(x, delta, weight, epsilon)
            if done is not None:
                return done
        h = x if delta is None else x + delta
        if layer_norm:
            return h, torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, epsilon)
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return h, weight * wide.to(h.dtype)
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    rows, features = x.shape
    y = torch.empty_like(x)
    h = x if delta is None else torch.empty_like(x)
    cluster, threads, vectors = norm_plan(rows, features, _card(x.device).capability >= (9, 0))
    kernel = _function(
        "token_norm", x, THREADS=threads, VECTORS=vectors, LAYER_NORM=int(layer_norm),
        CLUSTER=cluster,
    )  # fmt: skip
    arguments = _NormArguments(
        x.data_ptr(), _pointer(delta), weight.data_ptr(), _pointer(bias), h.data_ptr(),
        y.data_ptr(), features, epsilon,
    )  # fmt: skip
    kernel(arguments, (cluster * rows, 1, 1), threads, cluster)
    return h, y


def activation(x: Tensor, gated: bool) -> Tensor:
    """``silu(gate) * up`` of rows ``[gate, up]`` if ``gated``, else ``max(x, 0)``."""
    if x.device.type != "cuda":
        if not gated:
            return torch.relu(x)
        y = on_cpu.silu(x) if x.device.type == "cpu" else None
        if y is not None:
            return y
        gate, up = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    x = x.contiguous()
    rows, features = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = x.new_empty(rows, features)
    # Few rows are spread over the processors; with many, each thread has several loads in flight.
    threads, of_thread = (64, 1) if rows <= 64 else (128, 4)
    kernel = _function("token_activation", x, SILU=int(gated), THREADS=threads, ROWS=of_thread)
    arguments = _ActivationArguments(x.data_ptr(), y.data_ptr(), rows, features)
    kernel(arguments, (-(-rows // of_thread), -(-features // (8 * threads)), 1), threads)
    return y


def attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    start: Tensor,
    shape: AttentionShape,
    rotary: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of one new token per sequence, whose key and value enter the cache.

    Args:
        qkv: ``[batch, (heads + 2 kv_heads) head_dim]``, queries, keys and values side by side.
        keys, values: the cache, ``[batch, kv_heads, capacity, head_dim]``; row ``position`` is
            written.
        position: int64 ``[1]``, where the new token stands.
        start: int32 ``[batch]``, where each sequence begins; what lies before is padding.
        rotary: cosines and sines ``[batch or 1, head_dim]`` of the new token.
        norms: weights ``[head_dim]`` of the RMS norms of queries and of keys.

    Returns:
        ``[batch, heads head_dim]``.
    """
    if qkv.device.type != "cuda":
        if qkv.device.type == "cpu":
            done = on_cpu.attention(
                qkv, keys, values, position, start, shape.heads, shape.scale, shape.epsilon,
                rotary, norms,
            )  # fmt: skip
            if done is not None:
                return done
        return _attention_by_torch(qkv, keys, values, position, start, shape, rotary, norms)
    qkv = qkv.contiguous()
    batch = qkv.shape[0]
    y = qkv.new_empty(batch, shape.heads * shape.head_dim)
    warps, parts = attention_plan(shape, batch, keys.shape[2], _card(qkv.device))
    kernel = _function(
        "token_attention", qkv, HEAD_DIM=shape.head_dim, QUERIES=shape.queries, WARPS=warps,
        ROTARY=int(rotary is not None), HEAD_NORM=int(norms is not None),
    )  # fmt: skip
    cosine, sine = (t.contiguous() for t in rotary) if rotary is not None else (None, None)
    stride = 0 if cosine is None or cosine.shape[0] == 1 else shape.head_dim
    query_norm, key_norm = norms if norms is not None else (None, None)
    arguments = _AttentionArguments(
        qkv.data_ptr(), _pointer(cosine), _pointer(sine), _pointer(query_norm), _pointer(key_norm),
        keys.data_ptr(), values.data_ptr(), position.data_ptr(), start.data_ptr(),
        y.data_ptr(), stride, shape.kv_heads, keys.shape[2], shape.scale, shape.epsilon,
    )  # fmt: skip
    kernel(arguments, (parts, shape.kv_heads, batch), 32 * warps, parts)
    return y


def prompt_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: AttentionShape,
    rotary: tuple[Tensor, Tensor] | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention within prompts without padding, whose keys and values enter the cache.

    On a GPU norms of heads, rotary embedding and the cache are one launch, and torch's flash
    attention reads queries and the cache where they lie.

    Args:
        qkv: ``[batch length, (heads + 2 kv_heads) head_dim]``, which may be overwritten.
        keys, values: the cache, ``[batch, kv_heads, capacity, head_dim]``; the first rows are
            written.
        rotary: cosines and sines ``[batch length, head_dim]``.
        norms: as in :func:`attention`.

    Returns:
        ``[batch length, heads head_dim]``.
    """
    batch, d = keys.shape[0], shape.head_dim
    rows, length = qkv.shape[0], qkv.shape[0] // batch
    if qkv.device.type == "cuda":
        _turn_heads(qkv, keys, values, length, shape, rotary, norms)
        q = qkv.view(batch, length, -1, d)[:, :, : shape.heads]
    else:
        q, k, v = _turned_heads(qkv, shape, rotary, norms)
        q, k, v = (t.view(batch, length, -1, d) for t in (q, k, v))
        keys[:, :, :length] = k.transpose(1, 2)
        values[:, :, :length] = v.transpose(1, 2)
    y = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys[:, :, :length], values[:, :, :length], is_causal=True,
        scale=shape.scale, enable_gqa=shape.queries > 1,
    )  # fmt: skip
    return y.transpose(1, 2).reshape(rows, -1)


def _turn_heads(
    qkv: Tensor, keys: Tensor, values: Tensor, length: int, shape: AttentionShape,
    rotary: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    if not qkv.is_contiguous():
        raise ValueError("queries, keys and values of a prompt must lie side by side")
    kernel = _function(
        "prompt_heads", qkv, HEAD_DIM=shape.head_dim, ROTARY=int(rotary is not None),
        HEAD_NORM=int(norms is not None),
    )  # fmt: skip
    cosine, sine = (t.contiguous() for t in rotary) if rotary is not None else (None, None)
    query_norm, key_norm = norms if norms is not None else (None, None)
    first = 0 if rotary is not None or norms is not None else shape.heads
    arguments = _HeadsArguments(
        qkv.data_ptr(), _pointer(cosine), _pointer(sine), _pointer(query_norm),
        _pointer(key_norm), keys.data_ptr(), values.data_ptr(), shape.heads, shape.kv_heads, first,
        length, keys.shape[2], shape.epsilon,
    )  # fmt: skip
    lanes = (shape.heads + 2 * shape.kv_heads - first) * shape.head_dim // 16
    kernel(arguments, (qkv.shape[0], -(-lanes // 128), 1), 128)


class DirectSum:
    """Sums over the GPUs of a host, through memory that all of them can write.

    Args:
        received: addresses of every rank's buffer of :meth:`bytes_for` bytes, as this process sees
            them; zero at first.
        rank: this process.
        most: values of the largest sum.
        device: this process's GPU.
    """

    VALUES = 4  # of a packet of 16 bytes

    def __init__(self, received: list[int], rank: int, most: int, device: torch.device) -> None:
        self.received, self.rank = received, rank
        self.capacity = -(-most // self.VALUES)
        self.calls = torch.zeros(-(-self.capacity // 256), dtype=torch.int32, device=device)

    @classmethod
    def bytes_for(cls, most: int, ranks: int) -> int:
        """Size of a rank's buffer."""
        return 2 * ranks * -(-most // cls.VALUES) * 16

    def takes(self, x: Tensor) -> bool:
        return (
            x.numel() % self.VALUES == 0
            and x.numel() // self.VALUES <= self.capacity
            and x.dtype in (torch.float16, torch.bfloat16)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, the same bits on all of them."""
        x = x.contiguous()
        y = torch.empty_like(x)
        packets = x.numel() // self.VALUES
        arguments = _SumArguments(
            x.data_ptr(), y.data_ptr(), (ctypes.c_void_p * 8)(*self.received),
            self.calls.data_ptr(), self.rank, len(self.received), packets, self.capacity,
        )  # fmt: skip
        _function("token_sum", x)(arguments, (-(-packets // 256), 1, 1), 256)
        return y


def _attention_by_torch(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, start: Tensor,
    shape: AttentionShape, rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    batch = qkv.shape[0]
    q, k, v = _turned_heads(qkv, shape, rotary, norms)
    keys.index_copy_(2, position, k[:, :, None])
    values.index_copy_(2, position, v[:, :, None])
    inside = torch.arange(keys.shape[2], device=qkv.device)
    mask = (inside <= position) & (inside >= start[:, None])
    y = torch.nn.functional.scaled_dot_product_attention(
        q[:, :, None],
        keys.repeat_interleave(shape.queries, dim=1),
        values.repeat_interleave(shape.queries, dim=1),
        attn_mask=mask[:, None, None],
        scale=shape.scale,
    )
    return y.reshape(batch, -1)


def _turned_heads(
    qkv: Tensor, shape: AttentionShape, rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries, keys and values ``[rows, heads, head_dim]``, normed and turned."""
    rows, d = qkv.shape[0], shape.head_dim
    parts = (shape.heads * d, shape.kv_heads * d, shape.kv_heads * d)
    q, k, v = (t.view(rows, -1, d) for t in qkv.split(parts, dim=-1))
    if norms is not None:
        q, k = (_head_norm(t, w, shape.epsilon) for t, w in zip((q, k), norms, strict=True))
    if rotary is not None:
        cosine, sine = (t.view(-1, 1, d) for t in rotary)
        q, k = (t * cosine + _turned(t) * sine for t in (q, k))
    return q, k, v


def _head_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _turned(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _card(device: torch.device) -> Card:
    from lutra.kernels.cuda.launch import card

    assert device.index is not None
    return card(device.index)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def defines(x_dtype: torch.dtype, **own: int) -> dict[str, int]:
    """Compile-time parameters; those of bit planes are of no meaning here."""
    of_planes = {"BITS": 1, "GROUP": 128, "UNIFORM": 1, "SCALE_FLOAT": 0}
    return of_planes | {"X_BF16": int(x_dtype == torch.bfloat16)} | own


@cache
def _loaded(
    name: str, dtype: torch.dtype, index: int, own: tuple[tuple[str, int], ...]
) -> Function:
    from lutra.kernels.cuda.launch import card, function

    return function(name, defines(dtype, **dict(own)), card(index))


def _function(name: str, x: Tensor, **own: int) -> Function:
    return _loaded(name, x.dtype, x.device.index, tuple(sorted(own.items())))
