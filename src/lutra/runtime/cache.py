"""A key-value cache of fixed size, written in place, whose next position lies on the device.

transformers has a static cache of its own; each of its layers computes positions for itself, five
launches a layer and token. Here all layers share one tensor with the position, which a CUDA graph
advances by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[batch, kv_heads, capacity, head_dim]``.

    A prompt fills rows from 0 on, and attention sees those rows alone. Then each call adds one
    token at the shared position, and attention sees the whole capacity through a mask.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, capacity: int, position: Tensor) -> None:
        super().__init__()
        self.capacity, self.position = capacity, position
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

        def room(like: Tensor) -> Tensor:
            shape = (like.shape[0], like.shape[1], self.capacity, like.shape[3])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self.keys, self.values = room(key_states), room(value_states)
        self.is_initialized = True

    def begin(self, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values, of which the caller writes the first ``length`` rows.

        Args:
            like: of the shape of keys, in all but their number.
        """
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        assert self.keys is not None and self.values is not None
        self.filled = length
        return self.keys, self.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self.filled == 0:
            length = key_states.shape[2]
            keys[:, :, :length] = key_states
            values[:, :, :length] = value_states
            self.filled = length
            return key_states, value_states
        keys.index_copy_(2, self.position, key_states)
        values.index_copy_(2, self.position, value_states)
        return keys, values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return (query_length if self.filled == 0 else self.capacity), 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return self.capacity


class StepCache(Cache):
    """The cache of a model. See the module's docstring.

    Args:
        layers: number of decoder blocks.
        capacity: tokens that it holds.
        device: of the model's first block.
    """

    def __init__(self, layers: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.step_layers = [StepLayer(capacity, self.position) for _ in range(layers)]
        super().__init__(layers=list(self.step_layers))

    def begin(self) -> None:
        """Forget what is stored, keep the memory."""
        for layer in self.step_layers:
            layer.filled = 0

    def end_prompt(self, length: int) -> None:
        """A prompt of ``length`` tokens has been read, by a recording perhaps."""
        for layer in self.step_layers:
            layer.filled = length
