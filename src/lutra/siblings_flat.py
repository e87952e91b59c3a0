"""Flattened linears that read one input: it becomes integers once, and they are one product.

As :mod:`lutra.siblings`, whose groups these are. Besides the launches this saves turning the same
activations into the same integers two or three times. Layers of one group are quantized with one
set of limits and one step, or they go on alone.

Weights of several digits have further columns, which a layer has for its own channels only. The
joint weight has as many columns for a channel as the member that needs most, with zeros in the
others; sums do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lutra.formats.flat import FlatWeight, pack_digits, unpack_digits, within_runs
from lutra.kernels.flat import FlatSpec, choose
from lutra.siblings import Siblings

_ROWS_AT_ONCE = 4096


class FlatSiblings(Siblings):
    """The shared part of flattened linears with one input."""

    _columns: list[Tensor]  # the joint further columns of each member
    _rotated: Tensor | None
    _form: tuple[int, int, int]  # bits, inputs and columns of the joint digits

    def _why_apart(self, members: Sequence[Any]) -> str | None:
        layers = [m for m in members if m is not None]
        if len(layers) < len(members):
            return "not all of them were copied"
        first = layers[0]
        for name, layer in zip(self.names, layers, strict=True):
            same = replace(layer.format, extra=first.format.extra)
            if same != first.format or layer.in_features != first.in_features:
                return (
                    f"{name} is {layer.format} of {layer.in_features} inputs, {self.names[0]} "
                    f"is {first.format} of {first.in_features}"
                )
            if layer.weight_device != first.weight_device:
                return f"they are on {first.weight_device} and {layer.weight_device}"
            if (layer.bias is None) != (first.bias is None) or (
                layer.bias is not None and layer.bias.dtype != first.bias.dtype
            ):
                return "some have a bias and some have none, or their dtypes differ"
            for mine, others in zip(layer.input_tensors(), first.input_tensors(), strict=True):
                if not torch.equal(mine, others):
                    return "their inputs are not quantized alike"
        return None

    def _join(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        weights: list[FlatWeight] = [layer.stored() for layer in layers]
        first = weights[0]
        source, self._columns = joint_columns([w.source for w in weights], first.in_features)
        digits = [
            _rearranged(w, columns, w.in_features + len(source))
            for w, columns in zip(weights, self._columns, strict=True)
        ]
        whole = replace(
            first, digits=torch.cat(digits, dim=1), scale=torch.cat([w.scale for w in weights]),
            source=source,
        )  # fmt: skip
        format = replace(layers[0].format, extra=source.numel())
        self.spec = FlatSpec(
            self._ends[-1], first.in_features, whole.columns, format.bits, format.static,
            format.smooth, whole.digits.device, dtype,
        )  # fmt: skip
        self._rotated = first.rotated
        self._form = (format.bits, first.in_features, whole.columns)
        self.choice = choose(self.spec)
        self.prepared = self.choice.kernel.prepare(whole, self.spec)

    def _cut(self, whole: Any, place: int) -> Any:
        """The stored digits of one member, int32 ``[1, out, words]``."""
        rows = self._rows(whole, place, 1)
        own = self._columns[place].to(whole.device)
        bits, inputs, columns = self._form
        if len(own) == columns - inputs and bool((own.diff() == 1).all()):
            return rows.clone()
        digits = unpack_digits(rows, bits, columns)
        kept = torch.cat([torch.arange(inputs, device=own.device), inputs + own])
        return pack_digits(digits[:, kept], bits)

    def _compute(self, x: Tensor) -> Tensor:
        from lutra.nn_flat import product

        assert self.choice is not None
        return product(x, self.choice.kernel, self.prepared, self.bias, self.spec, self._rotated)


def joint_columns(sources: Sequence[Tensor], in_features: int) -> tuple[Tensor, list[Tensor]]:
    """Further columns that serve several weights.

    Args:
        sources: the channel of each further column of each weight, int32 ``[extra]``.
        in_features: input channels.

    Returns:
        The channel of each joint column, int32, and for each weight the joint columns in which its
        own stand, int64 ``[extra]``; both counted from the first further column.
    """
    device = sources[0].device
    counts = [torch.bincount(s.long(), minlength=in_features) for s in sources]
    most = torch.stack(counts).amax(0)
    starts = most.cumsum(0) - most
    source = torch.arange(in_features, device=device).repeat_interleave(most).to(torch.int32)
    places = []
    for own, count in zip(sources, counts, strict=True):
        order = own.long().argsort(stable=True)
        rank = torch.empty_like(order)
        rank[order] = within_runs(count)
        places.append(starts[own.long()] + rank)
    return source, places


def _rearranged(weight: FlatWeight, further: Tensor, among: int) -> Tensor:
    """Packed digits in ``among`` columns: the inputs', and behind them further ones in places."""
    first = torch.arange(weight.in_features, device=further.device)
    columns = torch.cat([first, weight.in_features + further])
    if among == weight.columns and bool((columns.diff() == 1).all()):
        return weight.digits
    parts = []
    for begin in range(0, weight.out_features, _ROWS_AT_ONCE):
        some = weight.digits[:, begin : begin + _ROWS_AT_ONCE]
        digits = unpack_digits(some, weight.bits, weight.columns)
        wide = digits.new_zeros((len(digits), among))
        wide[:, columns] = digits
        parts.append(pack_digits(wide, weight.bits))
    return torch.cat(parts, dim=1)
