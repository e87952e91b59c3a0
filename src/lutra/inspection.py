"""`lutra inspect` and `lutra methods`: what is stored, what runs it, what there is to choose."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lutra.architectures import sibling_groups
from lutra.errors import CheckpointError
from lutra.evaluate.load import DTYPES, choose_dtype, open_checkpoint
from lutra.evaluate.size import LayerSize, is_quantized, measure_size
from lutra.formats.checkpoint import SourceCheckpoint, read_quantization_config
from lutra.kernels.dispatch import LinearSpec, choose
from lutra.kernels.flat import FlatSpec
from lutra.kernels.flat import choose as choose_flat
from lutra.methods import methods
from lutra.nn_flat import spec_of
from lutra.scheme import Format

#: Numbers of tokens at which `lutra inspect --kernels` says what runs.
BATCHES = tuple(1 << n for n in range(13))


@dataclass(frozen=True)
class Product:
    """Layers of a checkpoint that run as one product: one, or siblings that read the same input.

    Attributes:
        names: the layers, in the order of their rows.
        format: how they are stored.
        out_features: rows, all together.
        in_features: inputs.
    """

    names: tuple[str, ...]
    format: Format
    out_features: int
    in_features: int

    @property
    def is_flat(self) -> bool:
        """Whether weights and inputs are flattened integers, which have kernels of their own."""
        return self.format.kind == "flat"

    def flat_spec(self, device: torch.device, dtype: torch.dtype) -> FlatSpec:
        """What a kernel of flattened integers is told."""
        return spec_of(self.format, self.out_features, self.in_features, device, dtype)

    def spec(self, device: torch.device, dtype: torch.dtype, bits: int | None = None) -> LinearSpec:
        """What a kernel is told, with ``bits`` planes served."""
        bits = bits or self.format.bits
        return LinearSpec(
            self.out_features, self.in_features, bits,
            self.format.group_size_for(self.in_features), self.format.kind != "bcq" and bits > 1,
            device, dtype,
        )  # fmt: skip

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of the scales that are multiplied; those of integers become float32."""
        return torch.float32 if self.format.kind == "int" else self.format.scale_dtype

    def served(
        self, device: torch.device, dtype: torch.dtype
    ) -> list[tuple[LinearSpec, torch.dtype]]:
        """Specs of every precision that the file serves, each with the dtype of its scales."""
        widths = sorted({self.format.bits, *self.format.serve_bits})
        return [(self.spec(device, dtype, bits), self.scale_dtype) for bits in widths]


def checkpoint_products(folder: str | Path) -> tuple[SourceCheckpoint, list[Product]]:
    """A quantized checkpoint, and what is multiplied in it; nothing but headers is read.

    Raises:
        CheckpointError: the folder is damaged, or not quantized by lutra.
    """
    checkpoint = open_checkpoint(folder)
    if not is_quantized(checkpoint.config):
        raise CheckpointError(f"{folder} is not quantized by lutra: it has no kernels of ours")
    scheme = read_quantization_config(checkpoint.config)
    layers = {layer.name: layer for layer in measure_size(folder).layers}
    groups = sibling_groups(checkpoint.config.get("model_type"))
    products: list[Product] = []
    seen: set[str] = set()
    for name in layers:
        if name in seen:
            continue
        siblings = _siblings_of(name, groups, layers)
        kinds = {
            (_without_extra(scheme.format_of(n)), layers[n].in_features, f"{n}.bias" in checkpoint)
            for n in siblings
        }
        together = siblings if len(kinds) == 1 else (name,)
        format = scheme.format_of(name)
        assert format is not None
        seen.update(together)
        rows = sum(layers[n].out_features for n in together)
        products.append(Product(together, format, rows, layers[name].in_features))
    return checkpoint, products


def _without_extra(format: Format | None) -> str:
    """A format, but for the further columns that flattened siblings may have a different number of.

    What else must be the same to join them is in the tensors, which nobody reads here.
    """
    assert format is not None
    return str(replace(format, extra=0) if format.kind == "flat" else format)


def _siblings_of(
    name: str, groups: tuple[tuple[str, ...], ...], layers: dict[str, LayerSize]
) -> tuple[str, ...]:
    """The layer and those that read its input, where the checkpoint has all of them."""
    for group in groups:
        for path in group:
            prefix = name.removesuffix(path)
            if prefix != name and all(prefix + other in layers for other in group):
                return tuple(prefix + other for other in group)
    return (name,)


def inspect_checkpoint(
    folder: str | Path, device: str = "cpu", dtype: str = "float32", kernels: bool = False
) -> dict[str, Any]:
    """How each layer of a quantized checkpoint is stored, and which kernel would multiply it here.

    Nothing but headers is read.

    Args:
        folder: a checkpoint that lutra wrote.
        device, dtype: of the activations, for the choice of kernels.
        kernels: also list which program of the kernel runs for how many tokens.

    Returns:
        ``layers`` (``name``, ``format``, ``bits_per_weight``, ``kernel``, ``reason``, ``shape``),
        ``bits_per_weight``, ``size_bytes`` and ``quantization`` (the recipe). With ``kernels`` each
        layer also has ``runs_with`` (all layers of its product, itself included) and ``batches``,
        a list of ``tokens``, ``program`` and ``reason``.

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
    products = {}
    if kernels:
        products = {name: p for p in checkpoint_products(folder)[1] for name in p.names}
    layers = []
    for layer in size.layers:
        format = scheme.format_of(layer.name)
        assert format is not None
        entry: dict[str, Any] = {}
        if format.kind == "flat":
            flat_spec = spec_of(
                format, layer.out_features, layer.in_features, torch.device(device), DTYPES[dtype]
            )
            choice = choose_flat(flat_spec)
            entry |= _choice_of(checkpoint, layer.name)
        else:
            spec = LinearSpec(
                layer.out_features, layer.in_features, format.bits,
                format.group_size_for(layer.in_features), format.kind != "bcq" and format.bits > 1,
                torch.device(device), DTYPES[dtype],
            )  # fmt: skip
            choice = choose(spec)
        if kernels and layer.name in products:
            product = products[layer.name]
            described = _described(product, torch.device(device), DTYPES[dtype])
            entry["runs_with"] = list(product.names)
            entry["batches"] = [
                {"tokens": n, "program": program, "reason": why} for n, program, why in described
            ]
        layers.append(
            {
                "name": layer.name,
                "format": str(format),
                "bits_per_weight": layer.bits_per_weight,
                "kernel": choice.kernel.name,
                "reason": choice.reason,
                "shape": f"{layer.out_features}x{layer.in_features}",
                **entry,
            }
        )
    recipe = checkpoint.config["quantization_config"]
    layers += _left_as_they_were(checkpoint, {layer["name"] for layer in layers})
    layers.sort(key=lambda layer: layer["name"])
    return {
        "layers": layers,
        "bits_per_weight": size.bits_per_weight,
        "size_bytes": size.size_bytes,
        "quantization": {k: v for k, v in recipe.items() if k != "scheme"},
    }


def _described(
    product: Product, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, str, str]]:
    """Program and reason by number of tokens."""
    if product.is_flat:
        flat = product.flat_spec(device, dtype)
        kernel = choose_flat(flat).kernel
        return [(n, *kernel.describe(flat, n)) for n in BATCHES]
    spec = product.spec(device, dtype)
    runs = choose(spec).kernel
    return [(n, *runs.describe(spec, n, product.scale_dtype)) for n in BATCHES]


#: What `lutra inspect` shows of each layer that a method chose bits for.
CHOSEN = (
    "rung", "growth", "alpha", "rotated", "threshold", "wide_channels", "wide_weights",
    "clipped_inputs", "clipped_weights", "kl",
)  # fmt: skip


def _left_as_they_were(checkpoint: SourceCheckpoint, listed: set[str]) -> list[dict[str, Any]]:
    """Layers that a method looked at and left in their own dtype."""
    recorded = checkpoint.config["quantization_config"].get("layers")
    left = []
    for name, facts in recorded.items() if isinstance(recorded, dict) else ():
        stored = checkpoint.resolve(f"{name}.weight")
        if name in listed or stored is None or not isinstance(facts, dict):
            continue
        shape = checkpoint.shape(stored)
        left.append(
            {
                "name": name,
                "format": str(checkpoint.dtype(stored)).removeprefix("torch."),
                "bits_per_weight": 8.0 * checkpoint.dtype(stored).itemsize,
                "kernel": "torch",
                "reason": "not quantized",
                "shape": "x".join(map(str, shape)),
                **_choice_of(checkpoint, name),
            }
        )
    return left


def _choice_of(checkpoint: SourceCheckpoint, layer: str) -> dict[str, Any]:
    """What the checkpoint records of how a layer came to its bits."""
    recorded = checkpoint.config["quantization_config"].get("layers")
    facts = recorded.get(layer) if isinstance(recorded, dict) else None
    facts = facts if isinstance(facts, dict) else {}
    return {key: facts[key] for key in (*CHOSEN, "tried") if key in facts}


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
