"""CUDA kernels for bit planes: compiled by NVRTC on first use, launched through cuda-bindings.

- `binary_linear.cu`, 1 and 2 tokens: binary tensor cores; a plane word is an operand as it stands.
- `byte_linear.cu`, 3 to 16 tokens: 8-bit tensor cores on masked words.
- `field_linear.cu`, tens of tokens, Hopper: fp16 tensor cores on exact bit fields.
- `dequantize.cu`, more: dense rows for the library's product.

`layout.py` orders a weight once for all of them, `plans.py` lists how each could run, `tuning.py`
chooses by measured tables or by rule and says why, `products.py` launches.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def describe(self, spec: LinearSpec, tokens: int, scale: torch.dtype = torch.float16) -> str:
        """Name of the plan for a number of tokens, and why it was taken, for people."""
        from lutra.kernels.cuda.launch import card
        from lutra.kernels.cuda.layout import layout_for
        from lutra.kernels.cuda.tuning import choose

        index = spec.device.index
        gpu = card(index if index is not None else torch.cuda.current_device())
        plan, reason = choose(layout_for(spec), spec.uniform, scale.itemsize, tokens, gpu)
        return f"{plan.kernel}: {reason}"

    def warm_up(
        self, spec: LinearSpec, tokens: Sequence[int], scale: torch.dtype = torch.float16
    ) -> None:
        """Compile and load what products of these numbers of tokens need, and their workspaces.

        Before a CUDA graph is captured, for every number of tokens in it.
        """
        from lutra.kernels.cuda import products
        from lutra.kernels.cuda.layout import layout_for

        layout = layout_for(spec)
        products.load(layout, spec.uniform, scale, spec.dtype, spec.device, tuple(tokens))

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


class FusedLinear:
    """Several weights that multiply the same input, in one launch (q, k and v; gate and up).

    The weights become one, row after row; nothing is recomputed or rounded.

    Args:
        weights: same ``in_features``, bits, group size, kind and dtype of scales.
        dtype: of the activations.

    Raises:
        ValueError: the weights do not share a format.
        KernelError: no kernel of this package can run them.
    """

    def __init__(self, weights: Sequence[BitPlanes], dtype: torch.dtype) -> None:
        from lutra.errors import KernelError

        formats = {
            (w.in_features, w.bits, w.group_size, w.uniform, w.scale.dtype, w.planes.device)
            for w in weights
        }
        if len(formats) != 1:
            found = ", ".join(sorted(map(str, formats)))
            raise ValueError(f"weights of one launch share a format; these have {found}")
        self.out_features = [w.out_features for w in weights]
        whole = BitPlanes(
            torch.cat([w.planes for w in weights], dim=1),
            torch.cat([w.scale for w in weights], dim=1),
            torch.cat([w.offset for w in weights]),
            weights[0].in_features,
            weights[0].group_size,
        )
        self.spec = LinearSpec(
            whole.out_features, whole.in_features, whole.bits, whole.group_size, whole.uniform,
            whole.planes.device, dtype,
        )
        self.kernel = CudaKernel()
        refusal = self.kernel.supports(self.spec)
        if refusal:
            raise KernelError(f"the weights cannot be multiplied in one launch: {refusal}")
        self.prepared = self.kernel.prepare(whole, self.spec)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x`` ``[..., in]`` to one ``[..., out]`` for each weight, views of one result."""
        y = self.kernel.linear(x, self.prepared, None, self.spec)
        return y.split(self.out_features, dim=-1)
