"""`lutra inspect` and `lutra methods`: what is stored, what runs it, what there is to choose."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lutra.errors import CheckpointError
from lutra.evaluate.load import DTYPES, choose_dtype, open_checkpoint
from lutra.evaluate.size import is_quantized, measure_size
from lutra.formats.checkpoint import read_quantization_config
from lutra.kernels.dispatch import LinearSpec, choose
from lutra.methods import methods


def inspect_checkpoint(
    folder: str | Path, device: str = "cpu", dtype: str = "float32"
) -> dict[str, Any]:
    """How each layer of a quantized checkpoint is stored, and which kernel would multiply it here.

    Nothing but headers is read.

    Args:
        folder: a checkpoint that lutra wrote.
        device, dtype: of the activations, for the choice of kernels.

    Returns:
        ``layers`` (``name``, ``format``, ``bits_per_weight``, ``kernel``, ``reason``, ``shape``),
        ``bits_per_weight``, ``size_bytes`` and ``quantization`` (the recipe).

    Raises:
        CheckpointError: the folder is damaged, or not quantized by lutra.
        SchemeError: an unknown dtype.
    """
    checkpoint = open_checkpoint(folder)
    if not is_quantized(checkpoint.config):
        raise CheckpointError(f"{folder} is not quantized by lutra: there is nothing to inspect")
    choose_dtype(dtype, 0, device)
    scheme = read_quantization_config(checkpoint.config)
    size = measure_size(folder)
    layers = []
    for layer in size.layers:
        format = scheme.format_of(layer.name)
        assert format is not None
        spec = LinearSpec(
            layer.out_features, layer.in_features, format.bits,
            format.group_size_for(layer.in_features), format.kind != "bcq" and format.bits > 1,
            torch.device(device), DTYPES[dtype],
        )  # fmt: skip
        choice = choose(spec)
        layers.append(
            {
                "name": layer.name,
                "format": str(format),
                "bits_per_weight": layer.bits_per_weight,
                "kernel": choice.kernel.name,
                "reason": choice.reason,
                "shape": f"{layer.out_features}x{layer.in_features}",
            }
        )
    recipe = checkpoint.config["quantization_config"]
    return {
        "layers": layers,
        "bits_per_weight": size.bits_per_weight,
        "size_bytes": size.size_bytes,
        "quantization": {k: v for k, v in recipe.items() if k != "scheme"},
    }


def list_methods() -> list[dict[str, Any]]:
    """All methods: name, paper, scope, needs, formats, options with defaults, and a sentence."""
    listed = []
    for method in methods().values():
        defaults = {f.name: f.default for f in fields(method.options)}
        listed.append(
            {
                "name": method.name,
                "paper": method.paper,
                "scope": method.scope,
                "needs": sorted(method.needs(method.options())),
                "formats": list(method.formats),
                "options": defaults,
                "about": method.summary,
            }
        )
    return listed
