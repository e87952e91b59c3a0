"""What lies between the linear layers of a block when one token is decoded, on the CPU.

The functions of :mod:`lutra.kernels.cuda.token_step` for tensors in the processor's memory: as many
calls instead of some forty of torch, which take a sixth of the time of a token of a model of 8
billion weights of 2 bits. Each answers None where it does not serve; then torch does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 2}  # of kernels.h
LANES, MOST_DIM = 8, 512


@cache
def native() -> Any:
    """The extension, or None if it was not built."""
    from lutra.kernels.cpu import kernels

    if not kernels():
        return None
    from lutra.kernels.cpu.linear import native

    return native()


def serves(head_dim: int, features: int, dtype: torch.dtype) -> bool:
    """Whether a model of these sizes gets all three functions from here."""
    sizes = head_dim % (2 * LANES) == 0 and head_dim <= MOST_DIM and features % LANES == 0
    return sizes and dtype in CODES and native() is not None


def _serves(*tensors: Tensor | None) -> bool:
    """Plain tensors of one served dtype, outside of anything that traces or differentiates."""
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype
    return (
        dtype in CODES
        and all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in given)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and native() is not None
    )


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor] | None:
    """``h = x + delta`` and its RMS norm times ``weight``, for rows ``[batch, features]``."""
    rows, features = x.shape
    if features % LANES or not _serves(x, delta, weight):
        return None
    if delta is not None and delta.shape != x.shape or weight.shape != (features,):
        return None
    y = torch.empty_like(x)
    h = x if delta is None else torch.empty_like(x)
    native().token_add_norm(
        x.data_ptr(), 0 if delta is None else delta.data_ptr(), weight.data_ptr(), h.data_ptr(),
        y.data_ptr(), rows, features, epsilon, CODES[x.dtype],
    )  # fmt: skip
    return h, y


def silu(x: Tensor) -> Tensor | None:
    """``silu(gate) * up`` of rows ``[batch, 2 features]``, gates first."""
    rows, features = x.shape[0], x.shape[1] // 2
    if x.shape[1] % (2 * LANES) or not features or not _serves(x):
        return None
    y = x.new_empty(rows, features)
    native().token_silu(x.data_ptr(), y.data_ptr(), rows, features, CODES[x.dtype])
    return y


def attention(
    qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor, start: Tensor, heads: int,
    scale: float, epsilon: float, rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
) -> Tensor | None:  # fmt: skip
    """As :func:`lutra.kernels.cuda.token_step.attention`, which checks shapes.

    Raises:
        ValueError: the cache is full, or a sequence starts behind the position.
    """
    batch, kv_heads, capacity, dim = keys.shape
    cosine, sine = rotary if rotary is not None else (None, None)
    query_norm, key_norm = norms if norms is not None else (None, None)
    if dim % (2 * LANES) or dim > MOST_DIM or position.dtype != torch.int64:
        return None
    fits = (
        start.dtype == torch.int32 and start.shape == (batch,) and values.shape == keys.shape
        and qkv.shape == (batch, (heads + 2 * kv_heads) * dim) and heads % kv_heads == 0
        and all(t is None or t.shape in ((1, dim), (batch, dim)) for t in (cosine, sine))
        and all(t is None or t.shape == (dim,) for t in (query_norm, key_norm))
    )  # fmt: skip
    if not fits or not _serves(qkv, keys, values, cosine, sine, query_norm, key_norm):
        return None
    y = qkv.new_empty(batch, heads * dim)
    pointers = [0 if t is None else t.data_ptr() for t in (cosine, sine, query_norm, key_norm)]
    stride = 0 if cosine is None or cosine.shape[0] == 1 else dim
    native().token_attention(
        qkv.data_ptr(), *pointers, keys.data_ptr(), values.data_ptr(), position.data_ptr(),
        start.data_ptr(), y.data_ptr(), batch, heads, kv_heads, dim, stride, capacity, scale,
        epsilon, CODES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y
