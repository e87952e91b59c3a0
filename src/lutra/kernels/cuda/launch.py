"""Load compiled kernels on a device and launch them on torch's current stream.

Arguments travel as one struct by value. Launches ask for programmatic dependent launch on cards
that have it (compute capability 9 and up): a kernel may be scheduled while the one before it
drains, and waits (`griddepcontrol.wait`) before it reads what that one wrote.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch

from lutra.errors import KernelError
from lutra.kernels.cuda import nvrtc

_load_lock = threading.Lock()


@dataclass(frozen=True)
class Card:
    """What the kernels need to know of a GPU; shared memory of a block and of a processor."""

    index: int
    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int
    processor_shared_bytes: int = 0

    @property
    def arch(self) -> str:
        """Target of the compiler; cards from capability 9 have their own instruction sets."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def number(self) -> int:
        """Compute capability as NVRTC counts them: 90 for 9.0."""
        return self.capability[0] * 10 + self.capability[1]

    @property
    def dependent_launch(self) -> bool:
        return self.capability >= (9, 0)


#: One card of each architecture that the kernels are compiled for, to plan without a GPU.
TYPICAL_CARDS = {
    card.arch: card
    for card in (
        Card(0, "A100", (8, 0), 108, 166912, 167936),
        Card(0, "A40", (8, 6), 84, 101376, 102400),
        Card(0, "L40", (8, 9), 142, 101376, 102400),
        Card(0, "NVIDIA H200", (9, 0), 132, 232448, 233472),
        Card(0, "B200", (10, 0), 148, 232448, 233472),
        Card(0, "RTX PRO 6000", (12, 0), 188, 101376, 102400),
    )
}


@cache
def card(index: int) -> Card:
    """The GPU with torch's index ``index``."""
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", None) or 101376
    whole = getattr(p, "shared_memory_per_multiprocessor", None) or shared + 1024
    return Card(index, p.name, (p.major, p.minor), p.multi_processor_count, shared, whole)


@cache
def driver_version() -> tuple[int, int]:
    """CUDA version of the installed driver, such as (12, 4).

    Raises:
        KernelError: cuda-bindings is missing, or the driver does not answer.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(
            f"cuda-bindings cannot be loaded ({error}); install it with: pip install lutra[cuda]"
        ) from error
    try:
        number = _ok(driver.cuDriverGetVersion(), "say its version")
    except RuntimeError as error:  # cuda-bindings found no driver library
        raise KernelError(f"the CUDA driver cannot be loaded: {error}") from error
    return number // 1000, number % 1000 // 10


class Function:
    """A kernel loaded on one device.

    Args:
        name: kernel file, and name of the function in it.
        defines: compile-time parameters.
        device: the GPU.
        shared_bytes: dynamic shared memory of every launch.
    """

    def __init__(
        self, name: str, defines: Mapping[str, int], device: Card, shared_bytes: int = 0
    ) -> None:
        from cuda.bindings import driver

        self.name, self.device, self.shared_bytes = name, device, shared_bytes
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise KernelError(
                f"kernel {name} {dict(defines)} is not loaded yet and cannot be loaded while a "
                "CUDA graph is captured; run the layer once with this number of tokens first"
            )
        cubin = nvrtc.compile_cubin(name, defines, device.arch)
        with torch.cuda.device(device.index):
            torch.cuda.synchronize(device.index)  # its context exists and is current
            self._module = _ok(driver.cuModuleLoadData(cubin), f"load kernel {name}")
            self._function = _ok(
                driver.cuModuleGetFunction(self._module, name.encode()), f"find kernel {name}"
            )
            if shared_bytes > 40 * 1024:  # with what a kernel declares itself, 48 may be passed
                attribute = driver.CUfunction_attribute
                _ok(
                    driver.cuFuncSetAttribute(
                        self._function,
                        attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        shared_bytes,
                    ),
                    f"give kernel {name} {shared_bytes} bytes of shared memory",
                )
        self._configs: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._launch = driver.cuLaunchKernelEx

    def _config(self, cluster: int) -> Any:
        """Launch settings for one cluster size, made once."""
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.sharedMemBytes = self.shared_bytes
        ids = driver.CUlaunchAttributeID
        attributes = []
        if self.device.dependent_launch:
            dependent = driver.CUlaunchAttribute()
            dependent.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            dependent.value.programmaticStreamSerializationAllowed = 1
            attributes.append(dependent)
        if cluster > 1:
            clustered = driver.CUlaunchAttribute()
            clustered.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            clustered.value.clusterDim.x = cluster
            clustered.value.clusterDim.y = clustered.value.clusterDim.z = 1
            attributes.append(clustered)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def __call__(
        self, arguments: ctypes.Structure, grid: tuple[int, int, int], threads: int,
        cluster: int = 1,
    ) -> None:
        """Queue the kernel on the current stream of its device."""
        config = self._configs.get(cluster)
        if config is None:
            config = self._configs[cluster] = self._config(cluster)
        pointer = ctypes.c_void_p(ctypes.addressof(arguments))
        with self._lock:  # the settings are shared by all threads
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
            # torch.cuda.current_stream makes an object, which takes longer than the launch.
            config.hStream = torch._C._cuda_getCurrentRawStream(self.device.index)
            # The driver copies the arguments before it returns.
            result = self._launch(config, self._function, ctypes.addressof(pointer), 0)
        if result[0] != 0:
            _ok(result, f"launch kernel {self.name}")


@lru_cache(maxsize=4096)
def word_boxes(pointer: int, rows: int, columns: int, box_rows: int, box_columns: int) -> Any:
    """Description of boxes of a row-major array of 32-bit words in global memory, for copies.

    Args:
        pointer: address of the array, a multiple of 16.
        rows, columns: of the array; rows are a multiple of 16 bytes long.
        box_rows, box_columns: of a box, at most 256 each; what lies outside reads as 0.
    """
    return _boxes("INT32", pointer, rows, columns, columns * 4, box_rows, box_columns, "NONE")


@lru_cache(maxsize=1024)
def half_boxes(
    pointer: int, rows: int, columns: int, stride: int, box_rows: int, box_columns: int
) -> Any:
    """As :func:`word_boxes`, of 16-bit numbers, in shared memory with a swizzle of 128 bytes.

    Args:
        stride: from row to row, a multiple of 8.
        box_columns: at most 64; what lies outside is not written.
    """
    return _boxes("UINT16", pointer, rows, columns, stride * 2, box_rows, box_columns, "128B")


def _boxes(
    number: str, pointer: int, rows: int, columns: int, row_bytes: int, box_rows: int,
    box_columns: int, swizzle: str,
) -> Any:
    from cuda.bindings import driver

    made = _ok(
        driver.cuTensorMapEncodeTiled(
            getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{number}"),
            2,
            pointer,
            [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
            [driver.cuuint64_t(row_bytes)],
            [driver.cuuint32_t(box_columns), driver.cuuint32_t(box_rows)],
            [driver.cuuint32_t(1), driver.cuuint32_t(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "describe an array",
    )
    return (ctypes.c_ulonglong * 16)(*(int(word) for word in made.opaque))


_functions: dict[tuple[Any, ...], Function] = {}


def function(
    name: str, defines: Mapping[str, int], device: Card, shared_bytes: int = 0
) -> Function:
    """The kernel, compiled and loaded at most once per process and device."""
    key = (name, device.index, shared_bytes, tuple(sorted(defines.items())))
    found = _functions.get(key)
    if found is None:
        with _load_lock:
            found = _functions.get(key)
            if found is None:
                found = _functions[key] = Function(name, defines, device, shared_bytes)
    return found


def _ok(result: tuple[Any, ...], doing: str) -> Any:
    """Value of a driver call, or a :class:`KernelError` with the driver's words."""
    from cuda.bindings import driver

    status = result[0]
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        words = text.decode() if text else str(status)
        raise KernelError(f"the CUDA driver could not {doing}: {words} ({status})")
    return result[1] if len(result) > 1 else None
