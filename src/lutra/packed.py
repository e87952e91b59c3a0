"""The packed layers of a model, of either kind, for code that treats them alike."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lutra.nn import QuantizedLinear
from lutra.nn_flat import FlatLinear

PackedLinear = QuantizedLinear | FlatLinear


def packed_layers(model: nn.Module) -> Iterator[PackedLinear]:
    """All packed layers of a model, in the order of its modules."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            yield module
