"""``lutra bench kernel``: one product on one device, beside dense and the installed peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lutra.errors import KernelError


def run(
    device: str = "cpu",
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    batches: Sequence[int] = (1,),
    bits: Sequence[int] = (1, 2, 3, 4),
    group_sizes: Sequence[int] = (128,),
    threads: int = 1,
    peers: str | Sequence[str] = "all",
    kind: str = "planes",
    on_rows: Callable[[list[dict[str, Any]]], None] | None = None,
) -> dict[str, Any]:
    """Measure the kernels of ``device``.

    Args:
        device: ``cpu``, or a CUDA device (``cuda``, ``cuda:1``).
        shapes: ``(out_features, in_features)``.
        batches: rows of activations.
        bits: planes of our weights, or of flattened layers 4 and 8.
        group_sizes: inputs per group; -1 for one group per row. Not for flattened layers.
        threads: CPU threads (CPU only).
        peers: ``all``, ``none`` or names of other implementations.
        kind: ``planes``, or ``flat`` for flattened layers (8-bit integer products).
        on_rows: called with rows as they come, on CUDA devices with ``planes``.

    Returns:
        ``read_limit_gbps`` and ``rows``, each with ``implementation, shape, batch, bits, group, us,
        gbps, speedup_vs_dense, relative_error``.

    Raises:
        KernelError: a device or kind that there is no bench for.
        LutraError: a device that is not there.
    """
    family = device.split(":")[0]
    if kind not in ("planes", "flat"):
        raise KernelError(f"no kernel bench of kind {kind!r}; there are planes and flat")
    if family == "cpu":
        if kind == "flat":
            from lutra.bench import flat_cpu

            return flat_cpu.run(shapes, batches, bits, threads, peers)
        from lutra.bench import cpu

        return cpu.run(shapes, batches, bits, group_sizes, threads, peers)
    if family == "cuda":
        import torch

        from lutra.bench import cuda
        from lutra.evaluate.load import check_device

        check_device(device)
        names = peers.split(",") if isinstance(peers, str) else list(peers)
        wanted = True if "all" in names else [n for n in names if n and n != "none"]
        with torch.cuda.device(device):
            if kind == "flat":
                from lutra.bench import flat_cuda

                return flat_cuda.run(shapes, batches, bits, wanted)
            return cuda.run(shapes, batches, bits, group_sizes, wanted, on_rows=on_rows)
    raise KernelError(f"no kernel bench for device {device!r}; there are cpu and cuda")
