"""Compile a CUDA kernel without a GPU and look at what came out: spills, broken copies."""

from __future__ import annotations

import re
import struct

from lutra.kernels.cuda import nvrtc

_COPY_AT_UNIFORM_ADDRESS = 0xDAE  # the low 12 bits of such an instruction


def broken_copies(cubin: bytes) -> int:
    """Asynchronous copies that ptxas 13.0 gets wrong, counted in machine code for 9.0 and later.

    A copy to shared memory (``cp.async``) with a cache hint takes its address from a register and,
    where the compiler finds a part that all lanes share, from a uniform register. From 9.0 on the
    number of that register and the hint's are lost (``[R7+UR0], desc[UR1]``), and the instruction
    is illegal or writes anywhere. A source avoids it by an address that differs between lanes.
    """
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names = struct.unpack_from("<HHH", cubin, 0x3A)

    def section(index: int) -> tuple[int, int, int]:
        at = sections_at + index * entry_bytes
        (name,) = struct.unpack_from("<I", cubin, at)
        offset, size = struct.unpack_from("<QQ", cubin, at + 24)
        return name, offset, size

    names_at = section(names)[1]
    found = 0
    for index in range(count):
        name, offset, size = section(index)
        if not cubin.startswith(b".text.", names_at + name):
            continue
        code = struct.unpack_from(f"<{size // 8}Q", cubin, offset)
        found += sum(word & 0xFFF == _COPY_AT_UNIFORM_ADDRESS for word in code[::2])
    return found


def complaint(name: str, defines: dict[str, int], arch: str) -> str | None:
    """What is wrong with one instance of a kernel file on one architecture, or None."""
    options = [f"--gpu-architecture={arch}", *nvrtc.COMMON_OPTIONS, "--ptxas-options=-v"]
    options += [f"-D{key}={value}" for key, value in defines.items()]
    cubin, log = nvrtc.compile_uncached(nvrtc.source(name), options, f"{name}.cu")
    what = f"{name} {defines} on {arch}"
    if cubin[:4] != b"\x7fELF":
        return f"{what}: no machine code"
    spills = re.findall(r"(\d+) bytes spill stores", log)
    if not spills:
        return f"{what}: the compiler does not say whether registers spill:\n{log}"
    if any(map(int, spills)):
        return f"{what}: registers spill:\n{log[-400:]}"
    if "serialized" in log:  # tensor-core products that should run side by side
        return f"{what}:\n{log[-400:]}"
    if arch_number(arch) >= 90 and broken_copies(cubin):
        return f"{what}: {broken_copies(cubin)} copies that the compiler has broken"
    return None


def arch_number(arch: str) -> int:
    """90 for sm_90a."""
    return int(re.sub(r"\D", "", arch))
