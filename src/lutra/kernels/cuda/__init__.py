"""CUDA kernels for bit planes."""

from __future__ import annotations

from lutra.kernels.dispatch import Kernel


def kernels() -> list[Kernel]:
    """CUDA kernels that this installation has, fastest first."""
    return []
