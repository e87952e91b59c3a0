"""CUDA kernels for bit planes: compiled by NVRTC on first use, launched through cuda-bindings.

- `binary_linear.cu`, 1 and 2 tokens: binary tensor cores; a plane word is an operand as it stands.
- `byte_linear.cu`, 3 to 16 tokens: 8-bit tensor cores on masked words.
- `exact_linear.cu`, a handful of rows: fp32, nothing rounded.
- `sparse_linear.cu`, 3 to 8 tokens with free levels of 2 to 4 bits, Hopper: sparse products
  (`mma.sp`), every warp for itself, whose metadata are plane words.
- `stream_linear.cu`, 5 to 16 tokens with uniform levels, Hopper: fp16 tensor cores, every warp for
  itself, while other warps put x in order.
- `code_batch.cu`, 8 to 64 tokens with uniform levels, Hopper: the same by warpgroups, which cut
  the next codes meanwhile.
- `place_batch.cu`, 9 to 64 tokens with free levels of 2 to 4 bits, Hopper: sparse products of
  warpgroups, whose metadata are plane words; `place_arrange.cu` orders x for it.
- `field_linear.cu`, tens of tokens, Hopper: fp16 tensor cores on exact bit fields.
- `code_linear.cu`, from 8 tokens to any number, Hopper: fp16 tensor cores on exact integers.
- `code_prefill.cu`, a hundred tokens and more, Hopper: the same in blocks of more tokens, whose
  warps cut and multiply in turns; `prefill_arrange.cu` orders x for it.
- `dequantize.cu`, elsewhere: dense rows for the library's product.
- `float_linear.cu`, `float_expand.cu`: float32 activations (`float32.py`).

`layout.py` orders a weight once for all of them, `plans.py` lists how each could run, `tuning.py`
chooses by measured tables or by rule and says why, `products.py` launches.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import lutra.kernels.cuda.ops  # noqa: F401  (registers ops)
from lutra.errors import KernelError
from lutra.formats.bitplanes import BitPlanes
from lutra.kernels.dispatch import Kernel, LinearSpec

if TYPE_CHECKING:
    from lutra.kernels.cuda.launch import Card
    from lutra.kernels.flat import FlatKernel

MIN_CAPABILITY = (8, 0)


class CudaKernel(Kernel):
    """Bit planes on NVIDIA GPUs of compute capability 8.0 and up, float16 and bfloat16."""

    name = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def supports(self, spec: LinearSpec) -> str | None:
        from lutra.kernels.cuda.layout import unsupported_group

        if spec.device.type != "cuda":
            return f"the weight is on {spec.device.type}, not on a CUDA device"
        if spec.dtype not in self.dtypes:
            named = " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"activations are {spec.dtype}; this kernel takes {named}"
        return unsupported_group(spec.group_size, spec.in_features) or unusable(
            spec.device.index if spec.device.index is not None else torch.cuda.current_device()
        )

    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        from lutra.kernels.cuda import products
        from lutra.kernels.cuda.layout import layout_for, to_kernel_order

        _check_scales(weight)
        layout = layout_for(spec)
        prepared = to_kernel_order(weight, layout)
        prepared[1] = products.add_steps(prepared[1], layout, spec.uniform)
        products.load(layout, spec.uniform, prepared[1].dtype, spec.dtype, prepared[0].device)
        # Kernels fetch weights before they wait for the kernel ahead of them (see launch.py), so
        # nothing that writes a weight may still be under way when the first of them is queued.
        torch.cuda.synchronize(prepared[0].device)
        return prepared

    def describe(
        self, spec: LinearSpec, tokens: int, scale: torch.dtype = torch.float16
    ) -> tuple[str, str]:
        from lutra.kernels.cuda.layout import layout_for
        from lutra.kernels.cuda.tuning import choose

        plan, reason = choose(layout_for(spec), spec.uniform, scale.itemsize, tokens, _card(spec))
        return plan.kernel, reason

    def instances(
        self, spec: LinearSpec, tokens: Iterable[int], scale: torch.dtype = torch.float16,
        gpu: Card | None = None,
    ) -> list[tuple[str, dict[str, int]]]:
        """Kernel files, with their compile-time parameters, that a layer and its products launch.

        Args:
            tokens: numbers of tokens.
            scale: dtype of the stored scales.
            gpu: the card; default: that of the layer. Another needs not be there.
        """
        from lutra.kernels.cuda.layout import layout_for
        from lutra.kernels.cuda.plans import code_plans, has_steps
        from lutra.kernels.cuda.products import format_defines, plan_instances
        from lutra.kernels.cuda.tuning import choose

        layout, gpu = layout_for(spec), gpu or _card(spec)
        plans = {choose(layout, spec.uniform, scale.itemsize, n, gpu)[0] for n in tokens}
        needed = [("dequantize", format_defines(layout, spec.uniform, scale, spec.dtype))]
        if has_steps(layout, spec.uniform) and scale == torch.float16:
            if code_plans(layout, spec.uniform, scale.itemsize, 64, gpu):  # see add_steps
                needed.append(("steps", format_defines(layout, spec.uniform, scale, scale)))
        for plan in plans:
            needed += plan_instances(plan, layout, spec.uniform, scale, spec.dtype)
        return list({(n, *sorted(d.items())): (n, d) for n, d in needed}.values())

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


class CudaFloat32Kernel(CudaKernel):
    """The same bit planes with float32 activations (`float32.py`)."""

    name = "cuda-float32"
    dtypes = (torch.float32,)

    def prepare(self, weight: BitPlanes, spec: LinearSpec) -> list[Tensor]:
        from lutra.kernels.cuda import float32
        from lutra.kernels.cuda.layout import layout_for, to_kernel_order

        _check_scales(weight)
        layout = layout_for(spec)
        float32.load(layout, spec.uniform, weight.scale.dtype, _card(spec).index)
        return to_kernel_order(weight, layout)

    def describe(
        self, spec: LinearSpec, tokens: int, scale: torch.dtype = torch.float16
    ) -> tuple[str, str]:
        from lutra.kernels.cuda.float32 import MOST_TOKENS

        if tokens <= MOST_TOKENS:
            return "float_linear", f"up to {MOST_TOKENS} tokens of float32"
        return "float_expand", f"more than {MOST_TOKENS} tokens of float32: dense rows for torch"

    def instances(
        self, spec: LinearSpec, tokens: Iterable[int], scale: torch.dtype = torch.float16,
        gpu: Card | None = None,
    ) -> list[tuple[str, dict[str, int]]]:
        from lutra.kernels.cuda.float32 import defines
        from lutra.kernels.cuda.layout import layout_for

        layout = layout_for(spec)
        widths = [("float_linear", n) for n in (1, 4, 8)] + [("float_expand", 0)]
        return [(name, defines(layout, spec.uniform, scale, n)) for name, n in widths]

    def linear(
        self, x: Tensor, prepared: list[Tensor], bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        return torch.ops.lutra.cuda_linear_float32(
            x, *prepared, bias, spec.out_features, spec.in_features, spec.bits, spec.group_size,
            spec.uniform,
        )


def _check_scales(weight: BitPlanes) -> None:
    if weight.scale.dtype not in (torch.float16, torch.float32):
        raise KernelError(
            f"the CUDA kernels take scales in float16 and float32, not {weight.scale.dtype}"
        )


def kernels() -> list[Kernel]:
    """CUDA kernels that this installation has, fastest first; none without a GPU."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return []
    return [CudaKernel(), CudaFloat32Kernel()]


def flat_kernels() -> list[FlatKernel]:
    """As :func:`kernels`, for layers of flattened integers (`flat.py`)."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return []
    from lutra.kernels.cuda.flat import CudaFlatKernel

    return [CudaFlatKernel()]


def _card(spec: LinearSpec) -> Card:
    from lutra.kernels.cuda.launch import card

    index = spec.device.index
    return card(index if index is not None else torch.cuda.current_device())


@cache
def unusable(index: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None. Compiles and runs nothing."""
    from lutra.kernels.cuda import nvrtc
    from lutra.kernels.cuda.launch import card, driver_version

    device = card(index)
    if device.capability < MIN_CAPABILITY:
        major, minor = device.capability
        return f"{device.name} has compute capability {major}.{minor}; 8.0 is needed"
    try:
        nvrtc.version()
        supported = nvrtc.supported_archs()
        driver = driver_version()
    except KernelError as error:
        return str(error)
    if driver[0] < nvrtc.version()[0]:  # within one major version, drivers load newer code
        return (
            f"the driver supports CUDA {driver[0]}.{driver[1]} and cannot load what NVRTC "
            f"{nvrtc.version_text()} compiles; update the driver, or install an older NVRTC"
        )
    if device.number not in supported:
        return (
            f"NVRTC {nvrtc.version_text()} does not know {device.arch} "
            f"({device.name}); install a newer nvidia-cuda-nvrtc"
        )
    return None
