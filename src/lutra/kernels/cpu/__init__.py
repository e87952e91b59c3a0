"""CPU kernels for bit planes."""

from __future__ import annotations

from lutra.kernels.dispatch import Kernel


def kernels() -> list[Kernel]:
    """CPU kernels that this installation has, fastest first."""
    return []
