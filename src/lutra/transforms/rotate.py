"""Rotation: spread what few channels of a token have over a block of channels.

    x' = H_b x / sqrt(b)   within each block,   W' = W H_b / sqrt(b),   W' x' = W x

H_b is the Hadamard matrix of Sylvester's order (QuaRot, arXiv 2404.00456, rotates whole inputs by
it). Flattening holds channels that are large for all tokens; where a token has its large values
elsewhere than the next, no set of channels does, and a rotation makes all channels of a block alike
instead. The widest channels stay as they are, for they would widen their whole block.

What a rotation does is :func:`lutra.formats.flat.rotate_inputs`; here is which channels it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lutra.formats.flat import rotated_blocks


def blocks_to_rotate(size_I: Tensor, block: int) -> Tensor:
    """The blocks of all channels but the widest, int32 ``[blocks, block]``.

    A block takes every n-th of the n blocks' channels, so that it has channels of all heads: one
    step serves all blocks, and the less they differ the smaller it is.

    Args:
        size_I: how large each channel is.
        block: channels of a block, a power of two below their number.
    """
    count = rotated_blocks(len(size_I), block) * block
    narrow = torch.argsort(size_I, stable=True)[:count]
    return narrow.sort().values.to(torch.int32).reshape(block, -1).T.contiguous()
