"""Choose the kernel that multiplies a bit-plane weight, and say why.

A kernel is a class with `supports`, `prepare`, `restore` and `linear`. The choice depends on facts
only (device, shape, instruction set), is logged once for each reason, and never changes what the
stored weights mean. ``LUTRA_KERNEL=name`` forces one by name and fails if it cannot run.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lutra.errors import KernelError
from lutra.formats.bitplanes import BitPlanes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearSpec:
    """What a kernel needs to know of a layer before it sees its tensors.

    Attributes:
        out_features, in_features: shape of the weight.
        bits: planes that are multiplied.
        group_size: inputs per group (``>= in_features`` means one group per row).
        uniform: one stored scale per group; plane q has ``scale / 2^q``.
        device: where the weights lie.
        dtype: dtype of the activations.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    uniform: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: BitPlanes, dtype: torch.dtype) -> LinearSpec:
        """What there is to know of a weight, for activations of ``dtype``."""
        return cls(
            weight.out_features, weight.in_features, weight.bits, weight.group_size,
            weight.uniform, weight.planes.device, dtype,
        )  # fmt: skip


class Kernel(ABC):
    """One way to compute ``x @ weight.T + bias`` from bit planes."""

    name: str

    @abstractmethod
    def supports(self, spec: LinearSpec) -> str | None:
        """None if the kernel can run this layer here, else the reason why not, in words."""

    @abstractmethod
    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        """Tensors in the kernel's own layout, of about the size of the stored ones."""

    def prepare_joint(self, weights: Sequence[BitPlanes], spec: LinearSpec) -> list[Tensor]:
        """:meth:`prepare` for the rows of several weights, one weight's after the other's.

        Args:
            spec: of all of them together.
        """
        planes = torch.cat([w.planes for w in weights], dim=1)
        scale = torch.cat([w.scale for w in weights], dim=1)
        offset = torch.cat([w.offset for w in weights])
        whole = BitPlanes(planes, scale, offset, spec.in_features, spec.group_size)
        return self.prepare(whole, spec)

    @abstractmethod
    def restore(self, prepared: list[Tensor], spec: LinearSpec) -> BitPlanes:
        """Inverse of :meth:`prepare`, bit for bit, so that a loaded model can be saved again."""

    @abstractmethod
    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        """``x`` ``[..., in_features]`` to ``[..., out_features]`` in the dtype of ``x``."""

    def describe(
        self, spec: LinearSpec, tokens: int, scale: torch.dtype = torch.float16
    ) -> tuple[str, str]:
        """Which program of the kernel multiplies a number of tokens, and why that one.

        Args:
            scale: dtype of the stored scales.
        """
        return self.name, "one program for any number of tokens"


@dataclass(frozen=True)
class Choice:
    """A kernel and the reason for it, for logs and ``lutra inspect --kernels``.

    Attributes:
        kernel: a :class:`Kernel`, or another kind of kernel for another kind of layer.
        reason: in words.
    """

    kernel: Any
    reason: str


@cache
def kernels() -> tuple[Kernel, ...]:
    """All kernels of this installation, fastest first; the reference is last and takes anything."""
    from lutra.kernels.reference import ReferenceKernel

    found: list[Kernel] = []
    for module in ("lutra.kernels.cuda", "lutra.kernels.cpu"):
        import importlib

        found.extend(importlib.import_module(module).kernels())
    return (*found, ReferenceKernel())


@cache
def choose(spec: LinearSpec) -> Choice:
    """The first kernel that supports ``spec``; see :func:`first_supporting`."""
    return first_supporting(spec, kernels())


def first_supporting(spec: Any, candidates: Sequence[Any]) -> Choice:
    """The first of several kernels that supports ``spec``; the reason lists those passed over.

    Args:
        spec: what the kernels' ``supports`` takes.
        candidates: kernels, fastest first; the last supports everything.

    Raises:
        KernelError: ``LUTRA_KERNEL`` names a kernel that does not exist or cannot run ``spec``.
    """
    forced = os.environ.get("LUTRA_KERNEL")
    if forced:
        for kernel in candidates:
            if kernel.name == forced:
                refusal = kernel.supports(spec)
                if refusal:
                    raise KernelError(f"LUTRA_KERNEL={forced} cannot run {spec}: {refusal}")
                return Choice(kernel, f"forced by LUTRA_KERNEL={forced}")
        names = ", ".join(k.name for k in candidates)
        raise KernelError(f"LUTRA_KERNEL={forced}: no such kernel; there are {names}")
    passed_over: list[str] = []
    for kernel in candidates:
        refusal = kernel.supports(spec)
        if refusal is None:
            reason = "; ".join(passed_over) or "fastest available"
            if passed_over:
                _log_once(f"kernel {kernel.name} on {spec.device.type}: {reason}")
            return Choice(kernel, reason)
        passed_over.append(f"{kernel.name}: {refusal}")
    raise AssertionError("the reference kernel supports everything")


@cache
def _log_once(message: str) -> None:
    logger.info(message)
