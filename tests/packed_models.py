"""Small folders in our format, packed by plain rounding, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file

from lutra.formats.bitplanes import BitPlanes
from lutra.formats.checkpoint import quantization_config
from lutra.formats.grouped import Grouped
from lutra.scheme import Format, Scheme


def make_model(folder: Path, **config: Any) -> Path:
    """A random Llama of 64 positions in one file, whose inputs do not fill whole words."""
    config = {"intermediate_size": 172, "max_position_embeddings": 64} | config
    return save_tiny_model(
        folder, max_shard_size="1GB", tie_word_embeddings=False, initializer_range=0.1, **config
    )


def pack_layers(src: Path, dst: Path, kind: str = "ubcq", bits: int = 3) -> dict[str, Any]:
    """Quantize the linear layers of a folder by rounding; returns packed weights by layer."""
    dst.mkdir()
    for path in src.iterdir():
        if path.suffix == ".json":
            (dst / path.name).write_bytes(path.read_bytes())
    tensors = load_file(src / "model.safetensors")
    packed = {}
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        layer = name.removesuffix(".weight")
        groups = -(-weight.shape[1] // 64)
        step = torch.full((weight.shape[0], groups), 0.6 / 2**bits)
        zero = torch.full_like(step, 2.0 ** (bits - 1))
        codes = (weight / step[0, 0] + zero[0, 0]).round().clamp(0, 2**bits - 1).to(torch.int64)
        make = Grouped.from_codes if kind == "int" else BitPlanes.from_uniform
        packed[layer] = make(codes, step, zero, bits, 64)
        for suffix, tensor in packed[layer].tensors().items():
            tensors[f"{layer}.{suffix}"] = tensor
    save_file(tensors, dst / "model.safetensors", {"format": "pt"})
    config = json.loads((dst / "config.json").read_text())
    scheme = Scheme((("*_proj", Format(kind, bits, 64)),))
    config["quantization_config"] = quantization_config(scheme, method="rtn", seed=0)
    (dst / "config.json").write_text(json.dumps(config))
    return packed
