"""Products of flattened integers: what a kernel must do, and the choice among them.

The definition is the product of wide integers in :mod:`lutra.formats.flat`; :mod:`.lowering` turns
it into columns of a narrow multiplier, and :mod:`.reference` computes it slowly and plainly. A
kernel runs the same integers for any number of tokens, so what a model computes does not depend on
how many tokens are in a batch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lutra.formats.flat import FlatWeight, rotate_inputs
from lutra.kernels.dispatch import Choice, first_supporting
from lutra.kernels.flat.before import Before, apply

__all__ = ["Choice", "FlatKernel", "FlatSpec", "choose", "kernels"]


@dataclass(frozen=True)
class FlatSpec:
    """What a kernel needs to know of a flattened layer before it sees its tensors.

    Attributes:
        out_features, in_features: shape of the weight.
        columns: stored columns, ``in_features`` and the further digits of weights.
        bits: width of the stored digits, 4 or 8.
        static: whether activations have one step that is stored; else each token its own.
        smooth: whether inputs are divided by a stored scale first.
        device: where the weights lie.
        dtype: dtype of the activations.
    """

    out_features: int
    in_features: int
    columns: int
    bits: int
    static: bool
    smooth: bool
    device: torch.device
    dtype: torch.dtype


class FlatKernel(ABC):
    """One way to compute a flattened layer."""

    name: str

    @abstractmethod
    def supports(self, spec: FlatSpec) -> str | None:
        """None if the kernel can run this layer here, else the reason why not, in words."""

    @abstractmethod
    def prepare(self, weight: FlatWeight, spec: FlatSpec) -> list[Tensor]:
        """Tensors in the kernel's own layout."""

    @abstractmethod
    def restore(self, prepared: list[Tensor], spec: FlatSpec) -> Tensor:
        """The stored digits, int32 ``[1, out, words]``, bit for bit, so that a loaded model can be
        saved again. The layer keeps all other stored tensors itself.
        """

    @abstractmethod
    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``, for any
        number of tokens, none included."""

    def describe(self, spec: FlatSpec, tokens: int) -> tuple[str, str]:
        """Which program of the kernel multiplies a number of tokens, and why that one."""
        return self.name, "one program for any number of tokens"

    def rotate(self, x: Tensor, rotated: Tensor, spec: FlatSpec) -> Tensor:
        """:func:`lutra.formats.flat.rotate_inputs`, which comes before :meth:`linear`."""
        return rotate_inputs(x, rotated)

    def reads(self, before: Before, spec: FlatSpec) -> bool:
        """Whether :meth:`linear_of` computes ``before`` on the way to its integers."""
        return False

    def linear_of(
        self, x: Tensor, before: Before, prepared: list[Tensor], bias: Tensor | None, spec: FlatSpec
    ) -> Tensor:
        """:meth:`linear` of what ``before`` makes of ``x``."""
        return self.linear(apply(x, before), prepared, bias, spec)


@cache
def kernels() -> tuple[FlatKernel, ...]:
    """All kernels of this installation, fastest first; the reference is last and takes anything.

    A device's package lists its own in ``flat_kernels()``.
    """
    from lutra.kernels.flat.reference import ReferenceFlatKernel

    found: list[FlatKernel] = []
    for module in ("lutra.kernels.cuda", "lutra.kernels.cpu"):
        listed = getattr(importlib.import_module(module), "flat_kernels", list)
        found.extend(listed())
    return (*found, ReferenceFlatKernel())


@cache
def choose(spec: FlatSpec) -> Choice:
    """The first kernel that supports ``spec``, as :func:`lutra.kernels.dispatch.choose` does."""
    return first_supporting(spec, kernels())
