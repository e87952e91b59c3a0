"""`lutra warmup`: compile ahead what a model's layers run on a GPU.

CUDA kernels are compiled on first use, about half a second each, and kept on disk. Here all that a
checkpoint's layers can need, for any number of tokens, is compiled at once: for the GPU at hand, or
for an architecture by name on a machine without one (an image that is built once and started
often). Nothing but headers is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lutra.errors import KernelError, SchemeError
from lutra.evaluate.load import DTYPES, check_device
from lutra.inspection import checkpoint_products

if TYPE_CHECKING:
    from lutra.kernels.cuda.launch import Card

#: Up to here every number of tokens is looked at, above only powers of two: plans change rarely.
MANY_TOKENS = 256
MOST_TOKENS = 8192
THREADS = 8


def warmup(
    folder: str | Path,
    device: str = "cuda",
    arch: str | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Compile every kernel that the layers of a quantized checkpoint need.

    Args:
        folder: a checkpoint that lutra wrote.
        device: the GPU to compile for.
        arch: compile for this architecture (``sm_90a``) instead; needs no GPU.
        tokens: numbers of tokens that will be multiplied at a time; default: any.
        dtype: of the activations; default: the checkpoint's own.
        on_progress: called with kernels done, kernels in all, and the last one's name.

    Returns:
        ``arch``, ``card`` (None with ``arch``), ``dtype``, ``kernels`` (how many are needed),
        ``compiled`` (how many were not there yet), ``seconds``, ``cache`` (the folder) and
        ``layers`` (``name``, ``kernels``: the kernel files that it launches).

    Raises:
        CheckpointError: the folder is damaged, or not quantized by lutra.
        KernelError: no GPU, one that is not supported, an unknown architecture, no NVRTC, or a
            cache folder that cannot be written.
        SchemeError: a dtype that the kernels do not take.
    """
    from lutra.kernels.cuda import CudaKernel, nvrtc
    from lutra.kernels.cuda.flat import CudaFlatKernel
    from lutra.kernels.cuda.flat_products import kind_of
    from lutra.runtime.flat_inputs import may_read

    checkpoint, products = checkpoint_products(folder)
    chosen = _dtype(dtype, checkpoint.config)
    cards, card_name = _cards(device, arch)
    counts = list(tokens) if tokens is not None else _all_tokens()
    kernel, flat = CudaKernel(), CudaFlatKernel()
    needed: dict[tuple[Any, ...], tuple[str, dict[str, int]]] = {}
    layers = []
    for product in products:
        names = set()
        found: list[tuple[str, dict[str, int]]] = []
        place = torch.device("cuda", 0)
        for gpu in cards:
            if product.is_flat:
                before = may_read(checkpoint.config, product.names[-1])
                kinds = [(0, 0), *(kind_of(b) for b in before)]
                found += flat.instances(product.flat_spec(place, chosen), counts, kinds, gpu)
            else:
                for spec, scale in product.served(place, chosen):
                    found += kernel.instances(spec, counts, scale, gpu)
        for name, defines in found:
            needed[name, *sorted(defines.items())] = name, defines
            names.add(name)
        layers.append({"name": ", ".join(product.names), "kernels": sorted(names)})

    target = cards[0].arch
    nvrtc.check_cache()
    started, done, compiled = time.perf_counter(), 0, 0

    def compile_one(job: tuple[str, dict[str, int]]) -> tuple[str, bool]:
        name, defines = job
        was_there = nvrtc.is_cached(name, defines, target)
        nvrtc.compile_cubin(name, defines, target)
        return name, was_there

    with ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        for name, was_there in pool.map(compile_one, needed.values()):
            done, compiled = done + 1, compiled + (not was_there)
            if on_progress is not None:
                on_progress(done, len(needed), name)
    return {
        "arch": target,
        "card": card_name,
        "dtype": str(chosen).removeprefix("torch."),
        "kernels": len(needed),
        "compiled": compiled,
        "seconds": time.perf_counter() - started,
        "cache": str(nvrtc.cache_folder()),
        "layers": layers,
    }


def _all_tokens() -> list[int]:
    powers = [1 << n for n in range(MOST_TOKENS.bit_length()) if 1 << n > MANY_TOKENS]
    return [*range(1, MANY_TOKENS + 1), *powers]


def _dtype(asked: str | None, config: dict[str, Any]) -> torch.dtype:
    name = asked or str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = DTYPES.get(name.removeprefix("torch."))
    if dtype not in (torch.float16, torch.bfloat16):
        whose = "--dtype" if asked else "the checkpoint's own dtype"
        raise SchemeError(
            f"{whose} is {name}; the CUDA kernels take float16 and bfloat16 activations. "
            "Pass --dtype float16 or --dtype bfloat16, here and where the model is run."
        )
    return dtype


def _cards(device: str, arch: str | None) -> tuple[list[Card], str | None]:
    """Cards to plan for, all of one architecture, and the name of the one at hand."""
    from lutra.kernels.cuda import nvrtc, unusable
    from lutra.kernels.cuda.launch import TYPICAL_CARDS, card

    if arch is not None:
        if arch not in TYPICAL_CARDS:
            raise KernelError(f"no architecture {arch!r}; there are {', '.join(TYPICAL_CARDS)}")
        typical = TYPICAL_CARDS[arch]
        if typical.number not in nvrtc.supported_archs():
            raise KernelError(f"NVRTC {nvrtc.version_text()} does not compile for {arch}")
        # With the tables that were measured on this card, and as a card without any.
        return [typical, replace(typical, name=arch)], None
    where = torch.device(device) if device else None
    if where is None or where.type != "cuda":
        raise KernelError(
            f"only the CUDA kernels are compiled on the user's machine; {device!r} needs no warmup"
        )
    if not torch.cuda.is_available():
        raise KernelError(
            "there is no GPU here to compile for; name its architecture, as in --arch sm_90a "
            f"(known: {', '.join(TYPICAL_CARDS)})"
        )
    check_device(device)
    index = where.index if where.index is not None else torch.cuda.current_device()
    refusal = unusable(index)
    if refusal is not None:
        raise KernelError(refusal)
    return [card(index)], card(index).name
