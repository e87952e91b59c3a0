"""Linears that read one input run as one product: q, k and v of attention, gate and up of an MLP.

A product of one token costs a fixed time (a launch, the preparation of the input, the last tiles)
besides the reading of its weight, so three products of a third of the rows are slower than one. The
module tree stays what it is: siblings keep their names, their parameters and their place in the
``state_dict``. What they share is a :class:`Siblings` object, which holds their weights row after
row in one prepared weight. The first sibling that is called with a tensor multiplies for all; the
others, called with the very same tensor, return their rows of that result.

Each row of the weight is multiplied as it was before, so results do not change.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lutra.formats.bitplanes import BitPlanes
from lutra.kernels.dispatch import Choice, LinearSpec, choose

if TYPE_CHECKING:
    from lutra.nn import QuantizedLinear
    from lutra.nn_flat import FlatLinear

logger = logging.getLogger(__name__)


class Siblings:
    """The shared part of linears with one input. Made by :func:`join_siblings`.

    The object refers to its members weakly, so a model is freed as soon as it is dropped. A copy of
    a member enters the copy of the group; where not all members were copied, those that were go on
    alone.

    Args:
        members: at least two layers of the same ``in_features``.
        names: what to call them, in messages.
    """

    def __init__(
        self, members: Sequence[QuantizedLinear | FlatLinear], names: Sequence[str]
    ) -> None:
        self.names = tuple(names)
        self.apart: str | None = None
        self.choice: Choice | None = None
        self.spec: Any = None  # LinearSpec, or that of another kind of layer
        self.prepared: list[Tensor] = []
        self.bias: Tensor | None = None
        self._ends: list[int] = []
        self._members: list[weakref.ref[Any] | None] = [None] * len(members)
        self._is_copy = False
        self._held: _Held | None = None
        self._traced: tuple[Tensor, Tensor, set[int]] | None = None
        for place, member in enumerate(members):
            member.enter_siblings(self, place)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without members, who enter by themselves, and activations."""
        members: list[None] = [None] * len(self._members)
        return self.__dict__ | {
            "_members": members, "_is_copy": True, "_held": None, "_traced": None,
        }  # fmt: skip

    def enter(self, member: QuantizedLinear | FlatLinear, place: int) -> None:
        self._members[place] = weakref.ref(member)

    def members(self) -> list[Any]:
        """The layers, in the order of their rows; None for one that does not exist any more."""
        return [None if ref is None else ref() for ref in self._members]

    def usable(self) -> bool:
        """False in a copy of a group of which not all members were copied."""
        if self._is_copy:
            self._is_copy = any(member is None for member in self.members())
        return not self._is_copy

    # ---- the weight

    def prepare(self, dtype: torch.dtype) -> bool:
        """Make one prepared weight of the members' weights, which they give up.

        Returns:
            False if the members have to go on alone; :attr:`apart` says why.
        """
        members = self.members()
        self.apart = self._why_apart(members)
        if self.apart is not None:
            logger.debug("%s run apart: %s", ", ".join(self.names), self.apart)
            return False
        layers = [m for m in members if m is not None]
        for layer in layers:
            layer.release()
        rows = [layer.out_features for layer in layers]
        self._ends = [sum(rows[: i + 1]) for i in range(len(rows))]
        self._join(layers, dtype)
        assert self.choice is not None and self.spec is not None
        self.bias = None
        biases = [layer.bias for layer in layers]
        if all(bias is not None for bias in biases):
            self.bias = torch.cat([bias.data for bias in biases if bias is not None])
            for place, bias in enumerate(biases):
                assert bias is not None
                bias.data = self._rows(self.bias, place)  # so a change of one reaches the product
        for layer in layers:
            layer.joined(self.choice, self.spec)
        return True

    def _why_apart(self, members: Sequence[Any]) -> str | None:
        """Why the members can not be multiplied as one, in words, or None."""
        return _why_apart(members, self.names)

    def _join(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        """Choose the kernel of all layers together and give it their weights, row after row."""
        weights = [layer.bitplanes() for layer in layers]
        self.spec = replace(LinearSpec.of(weights[0], dtype), out_features=self._ends[-1])
        self.choice = choose(self.spec)
        self.prepared = self.choice.kernel.prepare_joint(weights, self.spec)

    def stored(self, place: int) -> Any:
        """The weight of one member, restored from the joint one into memory of its own."""
        assert self.choice is not None and self.spec is not None
        return self._cut(self.choice.kernel.restore(self.prepared, self.spec), place)

    def release(self) -> None:
        """Give every member its weight back."""
        if self.choice is None or self.spec is None:
            return
        members = [m for m in self.members() if m is not None]
        whole: Any = None
        if any(member.gave_up_weight for member in members):
            whole = self.choice.kernel.restore(self.prepared, self.spec)
        self.choice, self.spec, self.prepared, self.bias = None, None, [], None
        self._held = self._traced = None
        for place, member in enumerate(self.members()):
            if member is not None:
                lost = member.gave_up_weight
                member.parted(self._cut(whole, place) if whole is not None and lost else None)

    def _rows(self, tensor: Tensor, place: int, dim: int = 0) -> Tensor:
        begin = self._ends[place - 1] if place else 0
        return tensor.narrow(dim, begin, self._ends[place] - begin)

    def _cut(self, whole: Any, place: int) -> Any:
        """One member's part of what the kernel restored."""
        return BitPlanes(
            self._rows(whole.planes, place, 1).clone(),
            self._rows(whole.scale, place, 1).clone(),
            self._rows(whole.offset, place).clone(),
            whole.in_features,
            whole.group_size,
        )

    # ---- the product

    def multiply(self, x: Tensor, place: int) -> Tensor:
        """The rows of one member of ``x @ weight.T + bias``, a view of the joint result."""
        y = self._traced_product(x, place) if _is_traced() else self._product(x, place)
        return self._rows(y, place, -1)

    def whole(self, x: Tensor, layers: Sequence[nn.Module]) -> Tensor | None:
        """The results of all members side by side; None if ``layers`` are not they, in order."""
        members = self.members()
        same = len(members) == len(layers) and all(
            a is b for a, b in zip(members, layers, strict=True)
        )
        if not same or not self.usable():
            return None
        if (self.spec is None or self.spec.dtype != x.dtype) and not self.prepare(x.dtype):
            return None
        return self._compute(x)

    def _product(self, x: Tensor, place: int) -> Tensor:
        held = self._held  # read once: another thread may replace it
        if held is None or not held.serves(x, place):
            held = _Held(x, self._compute(x), len(self._members), self)
            self._held = held
        held.waiting.discard(place)
        if not held.waiting:
            self._held = None
        return held.y

    def _traced_product(self, x: Tensor, place: int) -> Tensor:
        """The same while torch.compile traces: it follows no weak references."""
        traced = self._traced
        if traced is not None and traced[0] is x and place in traced[2]:
            y, waiting = traced[1], traced[2] - {place}
        else:
            y, waiting = self._compute(x), set(range(len(self._members))) - {place}
        self._traced = (x, y, waiting) if waiting else None
        return y

    def _compute(self, x: Tensor) -> Tensor:
        assert self.choice is not None and self.spec is not None
        return self.choice.kernel.linear(x, self.prepared, self.bias, self.spec)

    def describe(self, place: int, is_joined: bool) -> str:
        """What the printed form of the layer at a place says of the others; empty if nothing."""
        if is_joined:
            others = [n for i, n in enumerate(self.names) if i != place]
            return f", one product with {' and '.join(others)}"
        return f", alone: {self.apart}" if self.apart else ""


class _Held:
    """A joint result until all siblings have taken their rows, or its input is gone."""

    def __init__(self, x: Tensor, y: Tensor, members: int, owner: Siblings) -> None:
        self.y = y
        self.waiting = set(range(members))
        self.gradient = torch.is_grad_enabled()
        self.version = _version(x)
        held, group = weakref.ref(self), weakref.ref(owner)

        def gone(_: weakref.ref[Tensor]) -> None:
            siblings = group()
            if siblings is not None and siblings._held is held():
                siblings._held = None

        self.x = weakref.ref(x, gone)

    def serves(self, x: Tensor, place: int) -> bool:
        """Whether the result is that of ``x``, and the member has not had it yet.

        A member that asks twice has its answer computed anew: tensors made under
        ``inference_mode`` do not count their changes, and ``x`` may hold new values by then.
        """
        return (
            self.x() is x
            and place in self.waiting
            and self.version == _version(x)
            and self.gradient == torch.is_grad_enabled()
        )


def _version(x: Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if x.is_inference() else x._version


def _is_traced() -> bool:
    return torch.compiler.is_compiling()


def _why_apart(members: Sequence[QuantizedLinear | None], names: Sequence[str]) -> str | None:
    """Why layers can not be multiplied as one, in words, or None."""
    layers = [m for m in members if m is not None]
    if len(layers) < len(members):
        return "not all of them were copied"
    formats = [f"{m.format} at {m.served_bits} bits" for m in layers]
    if len(set(formats)) > 1:
        listed = ", ".join(f"{n} {f}" for n, f in zip(names, formats, strict=True))
        return f"their formats differ ({listed})"
    if len({m.in_features for m in layers}) > 1:
        return "they take inputs of different sizes"
    devices = {str(m.weight_device) for m in layers}
    if len(devices) > 1:
        return f"they are on different devices ({', '.join(sorted(devices))})"
    biases = {None if m.bias is None else m.bias.dtype for m in layers}
    if len(biases) > 1:
        return "some have a bias and some have none, or their dtypes differ"
    return None


def join_siblings(model: nn.Module) -> int:
    """Let all linears of a model that read one input share a product; the number of such groups.

    Which ones do is known for the families of :mod:`lutra.architectures`; in other models every
    linear runs alone. Weights are joined when they are next prepared.
    """
    from lutra.architectures import sibling_groups
    from lutra.nn import QuantizedLinear
    from lutra.nn_flat import FlatLinear
    from lutra.siblings_flat import FlatSiblings

    config = getattr(model, "config", None)
    groups = sibling_groups(getattr(config, "model_type", None))
    made = 0
    for parent in list(model.modules()) if groups else ():
        for group in groups:
            members = [_at(parent, path) for path in group]
            for layer, kind in ((QuantizedLinear, Siblings), (FlatLinear, FlatSiblings)):
                layers = [m for m in members if isinstance(m, layer)]
                if len(layers) == len(group) and all(m.siblings is None for m in layers):
                    kind(layers, [path.rpartition(".")[2] for path in group])
                    made += 1
    return made


def _at(parent: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        found = parent._modules.get(name)
        if found is None:
            return None
        parent = found
    return parent
