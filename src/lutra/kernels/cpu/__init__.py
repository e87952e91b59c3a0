"""CPU kernels for bit planes: lookup tables with AVX-512, AVX2, NEON or plain C++.

``LUTRA_CPU_ISA`` forces an instruction set (``avx512vnni``, ``avx512bw``, ``avx2``, ``neon``,
``portable``), for tests and comparisons.
"""

from __future__ import annotations

import logging
from functools import cache

from lutra.kernels.dispatch import Kernel

logger = logging.getLogger(__name__)


@cache
def kernels() -> list[Kernel]:
    """CPU kernels that this installation has, the default first; empty without the extension.

    Raises:
        KernelError: ``LUTRA_CPU_ISA`` names a level that this machine or build does not have.
    """
    from lutra.kernels.cpu.linear import CpuKernel, native

    try:
        native()
    except ImportError as error:
        logger.warning(
            "the CPU kernels were not built (%s); quantized layers on the CPU use the pure-torch "
            "reference, which is slow. Install a C++ compiler and reinstall lutra to get them.",
            error,
        )
        return []
    return [CpuKernel(fast=False), CpuKernel(fast=True)]
