"""CPU kernels: lookup tables for bit planes with AVX-512, AVX2, NEON or plain C++, and integer
products for flattened layers with AMX, VNNI, AVX2 or plain C++.

``LUTRA_CPU_ISA`` forces an instruction set (``amx``, ``avx512vnni``, ``avx512bw``, ``avxvnni``,
``avx2``, ``neon``, ``portable``), for tests and comparisons. Kernels that have none of that name
take the nearest below.
"""

from __future__ import annotations

import logging
from functools import cache

from lutra.kernels.dispatch import Kernel
from lutra.kernels.flat import FlatKernel

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


@cache
def flat_kernels() -> list[FlatKernel]:
    """CPU kernels of flattened layers; empty without the extension, which :func:`kernels` says.

    Raises:
        KernelError: ``LUTRA_CPU_ISA`` names a level that this machine or build does not have.
    """
    if not kernels():
        return []
    from lutra.kernels.cpu.flat import CpuFlatKernel, native

    native()
    return [CpuFlatKernel()]
