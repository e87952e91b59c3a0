"""CUDA kernels for bit planes: compiled by NVRTC on first use, launched through cuda-bindings.

`binary_linear.cu` multiplies 1 to 4 tokens on binary tensor cores, where a plane word is an operand as
it stands; `dequantize.cu` expands rows for the library product of many tokens. `layout.py` orders a
weight for all of them, `products.py` chooses by the number of tokens.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import lutra.kernels.cuda.ops  # noqa: F401  (registers the op)
from lutra.formats.bitplanes import BitPlanes
from lutra.kernels.dispatch import Kernel, LinearSpec

MIN_CAPABILITY = (8, 0)


class CudaKernel(Kernel):
    """Bit planes on NVIDIA GPUs of compute capability 8.0 and up, float16 and bfloat16."""

    name = "cuda"

    def supports(self, spec: LinearSpec) -> str | None:
        from lutra.kernels.cuda.layout import unsupported_group

        if spec.device.type != "cuda":
            return f"the weight is on {spec.device.type}, not on a CUDA device"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"activations are {spec.dtype}; float16 and bfloat16 are supported"
        return unsupported_group(spec.group_size, spec.in_features) or _unusable(
            spec.device.index if spec.device.index is not None else torch.cuda.current_device()
        )

    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        from lutra.kernels.cuda import products
        from lutra.kernels.cuda.layout import layout_for, to_kernel_order

        layout = layout_for(spec)
        prepared = to_kernel_order(weight, layout)
        products.load(layout, spec.uniform, prepared[1].dtype, spec.dtype, prepared[0].device)
        # Kernels fetch weights before they wait for the kernel ahead of them (see launch.py), so
        # nothing that writes a weight may still be under way when the first of them is queued.
        torch.cuda.synchronize(prepared[0].device)
        return prepared

    def restore(self, prepared: list[Tensor], spec: LinearSpec) -> BitPlanes:
        from lutra.kernels.cuda.layout import from_kernel_order, layout_for

        return from_kernel_order(prepared, layout_for(spec), spec.group_size)

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        return torch.ops.lutra.cuda_linear(
            x, *prepared, bias, spec.out_features, spec.in_features, spec.bits, spec.group_size,
            spec.uniform,
        )


def kernels() -> list[Kernel]:
    """CUDA kernels that this installation has, fastest first; none without a GPU."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return []
    return [CudaKernel()]


@cache
def _unusable(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None. Compiles and runs nothing."""
    from lutra.errors import KernelError
    from lutra.kernels.cuda import nvrtc
    from lutra.kernels.cuda.launch import card

    device = card(index)
    if device.capability < MIN_CAPABILITY:
        major, minor = device.capability
        return f"{device.name} has compute capability {major}.{minor}; 8.0 is needed"
    try:
        nvrtc.version()
        supported = nvrtc.supported_archs()
    except KernelError as error:
        return str(error)
    number = device.capability[0] * 10 + device.capability[1]
    if number not in supported:
        return (
            f"NVRTC {'.'.join(map(str, nvrtc.version()))} does not know {device.arch} "
            f"({device.name}); install a newer nvidia-cuda-nvrtc"
        )
    return None
